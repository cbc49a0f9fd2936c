"""Rewrites a template's syntax tree so that costly operations ask the budget.

Calls, filters and arithmetic go through the environment as jinja2 has it. The rest is made to:
loops, macros, `~`, slices, comparisons, lists and dicts, and arguments that are unpacked.
"""

import jinja2.nodes as nodes
import jinja2.visitor


def metered(tree: nodes.Template) -> nodes.Template:
    """Return the rewritten template."""
    _Meter().visit(tree)
    for loop in list(tree.find_all(nodes.For)):
        loop.body.insert(0, _enter(loop.body))
        if loop.test is not None:
            loop.test = nodes.And(_ask("step"), loop.test)
    for macro in list(tree.find_all(nodes.Macro)):
        macro.body.insert(0, _enter(macro.body))
    for block in list(tree.find_all(nodes.CallBlock)):
        block.body.insert(0, _enter(block.body))
    assert tree.environment is not None
    tree.set_environment(tree.environment)
    return tree


class _Meter(jinja2.visitor.NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _ask("join", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _ask("literal", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _ask("literal", node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _compared(pair.key)
        return _ask("literal", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _compared(node.expr)
        for operand in node.ops:
            operand.expr = _compared(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _ask("cut", node.node, *(end or nodes.Const(None) for end in ends))

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._unpacked(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._unpacked(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._unpacked(node)

    def _unpacked(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        if node.dyn_args is not None:
            node.dyn_args = _ask("few", node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = _ask("few", node.dyn_kwargs)
        return node


def _ask(method: str, *args: nodes.Expr) -> nodes.Call:
    """Return a call of an environment's method."""
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


def _compared(operand: nodes.Expr) -> nodes.Expr:
    return operand if isinstance(operand, nodes.Const) else _ask("comparable", operand)


def _enter(body: list[nodes.Node]) -> nodes.Output:
    literal = sum(len(data.data) for part in body for data in _with_self(part))
    return nodes.Output([_ask("enter", nodes.Const(literal))])


def _with_self(part: nodes.Node) -> list[nodes.TemplateData]:
    found = list(part.find_all(nodes.TemplateData))
    return [part, *found] if isinstance(part, nodes.TemplateData) else found

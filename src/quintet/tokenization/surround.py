"""The tokens that a pipeline adds around a text: `add_bos_token` and `add_eos_token`."""

from tokenizers import Tokenizer, processors

from quintet.errors import InputError

Token = tuple[str | None, int | None]


def surround(
    pipeline: Tokenizer, bos: Token, eos: Token, begin: bool | None, end: bool | None
) -> None:
    """Make a pipeline obey `add_bos_token` and `add_eos_token`, if it does not yet.

    Args:
        pipeline: changed in place.
        bos: the token that begins a text, and its id.
        eos: the token that ends a text, and its id.
        begin: `add_bos_token`; None leaves the beginning as it is.
        end: `add_eos_token`; None leaves the end as it is.

    Raises:
        InputError: a token is missing, or the pipeline adds others.
    """
    if begin is None and end is None:
        return
    empty = pipeline.encode("")
    pairs = zip(empty.ids, empty.special_tokens_mask, strict=True)
    found = [index for index, special in pairs if special]
    begin = bos[1] in found[:1] if begin is None else begin
    end = eos[1] in found[1 if begin and bos[1] == eos[1] else 0 :] if end is None else end
    for name, wanted, (_, index) in (("bos", begin, bos), ("eos", end, eos)):
        if wanted and index is None:
            raise InputError(f"add_{name}_token=True needs a {name}_token, and there is none")
    if found == [bos[1]] * bool(begin) + [eos[1]] * bool(end):
        return
    if not {*found} <= {bos[1], eos[1]}:
        raise InputError(
            f"add_bos_token={begin} and add_eos_token={end} contradict the pipeline, which "
            f"adds {[pipeline.id_to_token(index) for index in found]} around a text"
        )
    before = f"{bos[0]} " if begin else ""
    after = f" {eos[0]}" if end else ""
    pair = f"{bos[0]}:1 " if begin else ""
    known = [(token, index) for token, index in (bos, eos) if token is not None]
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after} {pair}$B:1{after + ':1' if end else ''}",
        special_tokens=[(token, index) for token, index in known if index is not None],
    )

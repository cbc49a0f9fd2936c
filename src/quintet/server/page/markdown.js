// Markdown as models write it, made into elements. Every step over the text is bounded: a text of
// any shape takes time in proportion to its length.

// Quotes and lists in each other, and emphasis in emphasis.
const DEEPEST = 8;
// Places looked at for the end of an emphasis.
const TRIES = 32;
// Characters of a link's text or address.
const REACH = 1000;

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(\S.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const QUOTE = /^ {0,3}> ?/;
const COLUMNS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const WEB = /^https?:\/\/[^\s<>"'`]/;
const LETTER = /[\p{L}\p{N}_]/u;

/**
 * Show a text in an element, which may show the beginning of it already: only the blocks that
 * changed are made again.
 */
function showMarkdown(element, text) {
  const blocks = blocksOf(text.split("\n"), 0);
  const shown = (element.shownBlocks ??= []);
  blocks.forEach((block, index) => {
    if (shown[index] === block.raw) return;
    const made = block.make();
    if (element.children[index]) element.children[index].replaceWith(made);
    else element.append(made);
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
  element.shownBlocks = blocks.map((block) => block.raw);
}

/** Part lines into blocks: what they say, and a function that makes the element. */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (lines[at].trim()) {
      const [end, build] = blockAt(lines, at, depth);
      blocks.push({ raw: lines.slice(at, end).join("\n"), make: build });
      at = end;
    } else at += 1;
  }
  return blocks;
}

function fill(element, lines, depth) {
  element.append(...blocksOf(lines, depth).map((block) => block.make()));
  return element;
}

// What a block begins with, and who reads it: gives where it ends and how it is made.
const KINDS = [
  [(line) => FENCE.exec(line), fenceAt],
  [(line) => HEADING.exec(line), headingAt],
  [(line) => RULE.exec(line), (lines, at) => [at + 1, () => make("hr")]],
  [(line, next, depth) => depth < DEEPEST && QUOTE.exec(line), quoteAt],
  [(line, next, depth) => depth < DEEPEST && ITEM.exec(line), listAt],
  [(line, next) => line.includes("|") && next.length < REACH && COLUMNS.test(next), tableAt],
];

function begins(lines, at, depth) {
  return KINDS.some(([starts]) => starts(lines[at], lines[at + 1] ?? "", depth));
}

function blockAt(lines, at, depth) {
  for (const [starts, take] of KINDS) {
    const found = starts(lines[at], lines[at + 1] ?? "", depth);
    if (found) return take(lines, at, found, depth);
  }
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines, end, depth)) end += 1;
  return [end, () => spans(make("p", { dir: "auto" }), lines.slice(at, end).join("\n"))];
}

function fenceAt(lines, at, [, fence, language]) {
  const closes = (line) => line.length >= fence.length && line === fence[0].repeat(line.length);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end].trim())) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  const name = language.trim().split(/\s/, 1)[0].slice(0, 32);
  return [Math.min(end + 1, lines.length), () => codeBlock(text, name)];
}

function codeBlock(text, language) {
  const name = make("span", {}, language || "text");
  const bar = make("div", { class: "bar" }, name, copyButton("Copy the code", () => text));
  // Who scrolls by keys has to get there.
  const place = { tabindex: "0", role: "region", "aria-label": language ? `Code in ${language}` : "Code" };
  return make("div", { class: "code" }, bar, make("pre", place, make("code", {}, text)));
}

function headingAt(lines, at, [, signs, text]) {
  let end = text.trimEnd().length;
  while (text[end - 1] === "#") end -= 1;
  // The page's own heading is the first.
  return [at + 1, () => spans(make(`h${Math.min(signs.length + 1, 6)}`), text.slice(0, end).trim())];
}

function quoteAt(lines, at, found, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end, () => fill(make("blockquote"), inner, depth + 1)];
}

function listAt(lines, at, [, outer, mark], depth) {
  const ordered = mark.length > 1;
  const items = [];
  const indentOf = (line) => line.length - line.trimStart().length;
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || found[2].length > 1 !== ordered) break;
    if (found[1].length > outer.length + 1 || RULE.test(lines[end])) break;
    const item = [lines[end].slice(found[0].length)];
    const text = found[1].length + found[2].length + 1;
    const belongs = (line) => line?.trim() && indentOf(line) >= Math.min(text, outer.length + 2);
    for (end += 1; end < lines.length; end += 1) {
      const line = lines[end];
      if (belongs(line)) item.push(line.slice(Math.min(indentOf(line), text)));
      else {
        // A blank line is part of an item that goes on, and so is a paragraph's next line.
        const begun = item.at(-1).trim() && !begins(lines, end, depth);
        if (!(line.trim() ? begun : belongs(lines[end + 1]))) break;
        item.push(line.trim());
      }
    }
    items.push(item);
    if (!lines[end]?.trim() && ITEM.test(lines[end + 1] ?? "")) end += 1;
  }
  const start = ordered && mark !== "1." ? Number.parseInt(mark, 10) : null;
  const build = () => {
    const made = items.map((item) => fill(make("li"), item, depth + 1));
    return make(ordered ? "ol" : "ul", { start }, ...made);
  };
  return [Math.max(end, at + 1), build];
}

function tableAt(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const side = (cell) => (cell.endsWith(":") ? (cell[0] === ":" ? "center" : "right") : null);
  const sides = cells(lines[at + 1]).map(side);
  const row = (line, tag) => {
    const made = cells(line).slice(0, sides.length);
    return make("tr", {}, ...made.map((cell, column) => spans(make(tag, { class: sides[column] }), cell)));
  };
  const build = () => {
    const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
    const table = make("table", {}, make("thead", {}, row(lines[at], "th")), make("tbody", {}, ...body));
    return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
  };
  return [end, build];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

/** Add a text to an element, with what is written inside of lines. */
function spans(element, text, depth = 0) {
  const absent = new Set();
  let from = 0;
  let at = 0;
  const put = (end, child, next) => {
    if (end > from) element.append(text.slice(from, end));
    if (child !== null) element.append(child);
    from = at = next;
  };
  // Looks for a mark once to the end of the text, and never again if it is not there.
  const find = (mark, start) => {
    if (absent.has(mark)) return -1;
    const place = text.indexOf(mark, start);
    if (place < 0) absent.add(mark);
    return place;
  };
  while (at < text.length) {
    const sign = text[at];
    if (sign === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      put(at, null, at + 1);
      at += 1;
    } else if (sign === "`") {
      const mark = run(text, at, "`");
      let end = find(mark, at + mark.length);
      while (end >= 0 && text[end + mark.length] === "`") end = find(mark, end + run(text, end, "`").length);
      if (end < 0) at += mark.length;
      else put(at, make("code", {}, text.slice(at + mark.length, end).trim()), end + mark.length);
    } else if ("*_~".includes(sign) && depth < DEEPEST) {
      const emphasis = emphasisAt(text, at, find);
      if (emphasis === null) at += run(text, at, sign).length;
      else {
        const [tag, length, end] = emphasis;
        put(at, spans(make(tag), text.slice(at + length, end), depth + 1), end + length);
      }
    } else if (sign === "[" || (sign === "!" && text[at + 1] === "[")) {
      const link = find("](", at) < 0 ? null : linkAt(text, at + (sign === "!" ? 1 : 0));
      if (link === null) at += 1;
      else {
        // A picture would tell its server who reads this: it is a link, followed or not.
        const label = sign === "!" ? `image: ${link.label || link.address}` : link.label;
        put(at, anchor(link.address, label, depth) ?? text.slice(at, link.end), link.end);
      }
    } else if (sign === "h" && WEB.test(text.slice(at, at + 10)) && !LETTER.test(text[at - 1] ?? "")) {
      let [address] = /^[^\s<>"'`]*/.exec(text.slice(at, at + REACH));
      // What ends a sentence is no part of it, nor a bracket that it did not open.
      address = address.replace(address.includes("(") ? /[.,;:!?*_~]+$/ : /[.,;:!?*_~)\]}]+$/, "");
      put(at, anchor(address, null, depth) ?? address, at + address.length);
    } else at += 1;
  }
  put(text.length, null, text.length);
  return element;
}

function run(text, at, sign) {
  let end = at;
  while (text[end] === sign) end += 1;
  return text.slice(at, end);
}

/** Return the tag, the length of the mark and where it ends, or null if nothing is emphasised. */
function emphasisAt(text, at, find) {
  const sign = text[at];
  const length = Math.min(run(text, at, sign).length, 2);
  if ((sign === "~" && length < 2) || !/\S/.test(text[at + length] ?? " ")) return null;
  if (sign === "_" && LETTER.test(text[at - 1] ?? "")) return null;
  const mark = sign.repeat(length);
  let end = find(mark, at + length);
  for (let tried = 0; end >= 0 && tried < TRIES; tried += 1) {
    const marks = run(text, end, sign).length;
    const inWord = sign === "_" && LETTER.test(text[end + marks] ?? "");
    const fits = length === 1 ? marks !== 2 : marks >= 2;
    if (/\S/.test(text[end - 1]) && !inWord && fits && end > at + length) {
      const tag = sign === "~" ? "del" : length === 2 ? "strong" : "em";
      // The marks inside close first: in ***a** b* the last of three is the outer one.
      return [tag, length, end + (marks > length && length === 2 ? marks - length : 0)];
    }
    end = find(mark, end + marks);
  }
  return null;
}

/** Read [label](address) at a bracket; null if there is none. */
function linkAt(text, at) {
  let open = 0;
  let close = at;
  const last = Math.min(text.length, at + REACH);
  for (; close < last; close += 1) {
    if (text[close] === "[") open += 1;
    else if (text[close] === "]" && --open === 0) break;
  }
  if (text[close] !== "]" || text[close + 1] !== "(") return null;
  let end = close + 2;
  const most = Math.min(text.length, end + REACH);
  for (open = 1; end < most; end += 1) {
    if (text[end] === "(") open += 1;
    else if (text[end] === ")" && --open === 0) break;
  }
  if (open !== 0) return null;
  const address = text.slice(close + 2, end).trim().split(/\s/, 1)[0].replace(/^<|>$/g, "");
  return { label: text.slice(at + 1, close), address, end: end + 1 };
}

/** A link to the web that tells nobody where it was followed; null for any other address. */
function anchor(address, label, depth) {
  const { href, protocol } = attempt(() => new URL(address)) ?? {};
  if (protocol !== "https:" && protocol !== "http:") return null;
  const link = make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" });
  if (label && depth < DEEPEST) {
    spans(link, label, depth + 1);
    // A link in a link is not one.
    for (const inner of link.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
  } else link.append(label || address);
  return link;
}

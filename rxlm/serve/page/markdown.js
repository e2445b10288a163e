// Markdown as elements: headings, paragraphs, lists, quotes, code, emphasis. Text only ever becomes
// text nodes, and links stay text, so whatever a model writes cannot run or load anything.
"use strict";

const markdown = (() => {
  const INLINE = /(`+)([\s\S]+?)\1(?!`)|\*\*([^\s*](?:[\s\S]*?[^\s*])?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*/;

  function element(name, ...children) {
    const made = document.createElement(name);
    made.append(...children);
    return made;
  }

  function inline(text) {
    const parts = [];
    for (let match = INLINE.exec(text); match; match = INLINE.exec(text)) {
      if (match.index > 0) parts.push(text.slice(0, match.index));
      if (match[2] !== undefined) parts.push(element("code", match[2].trim() || match[2]));
      else if (match[3] !== undefined) parts.push(element("strong", ...inline(match[3])));
      else parts.push(element("em", ...inline(match[4])));
      text = text.slice(match.index + match[0].length);
    }
    if (text) parts.push(text);
    return parts;
  }

  function listAt(lines, start) {
    const MARK = /^\s{0,3}(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
    const first = MARK.exec(lines[start]);
    if (!first) return null;
    const list = element(first[1] ? "ul" : "ol");
    if (first[2] && Number(first[2]) !== 1) list.start = Number(first[2]);
    let index = start;
    for (; index < lines.length; index += 1) {
      const item = MARK.exec(lines[index]);
      if (item && Boolean(item[1]) === Boolean(first[1])) list.append(element("li", ...inline(item[3])));
      else if (!item && /^\s+\S/.test(lines[index])) list.lastChild.append(" ", ...inline(lines[index].trim()));
      else break;
    }
    return [list, index];
  }

  const BREAK = /^(\s*$|#{1,6}\s|\s{0,3}(```|~~~|>|[-*+]\s|\d{1,9}[.)]\s))/;

  function block(lines, index) {
    const line = lines[index];
    const fence = /^\s{0,3}(```|~~~)/.exec(line);
    if (fence) {
      let end = index + 1;
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
      return [element("pre", element("code", lines.slice(index + 1, end).join("\n"))), end + 1];
    }
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    // The page has headings of its own down to the second level.
    if (heading) return [element(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2])), index + 1];
    if (/^\s{0,3}>/.test(line)) {
      let end = index;
      while (end < lines.length && /^\s{0,3}>/.test(lines[end])) end += 1;
      const inner = lines.slice(index, end).map((each) => each.replace(/^\s{0,3}> ?/, ""));
      return [element("blockquote", render(inner.join("\n"))), end];
    }
    const list = listAt(lines, index);
    if (list) return list;
    let end = index + 1;
    while (end < lines.length && !BREAK.test(lines[end])) end += 1;
    return [element("p", ...inline(lines.slice(index, end).join("\n"))), end];
  }

  function render(text) {
    const fragment = document.createDocumentFragment();
    const lines = text.replace(/\r\n?/g, "\n").split("\n");
    for (let index = 0; index < lines.length;) {
      if (lines[index].trim() === "") {
        index += 1;
        continue;
      }
      const [made, next] = block(lines, index);
      fragment.append(made);
      index = next;
    }
    return fragment;
  }

  return { render };
})();

// Elements from text that nobody vouches for. Nothing here or elsewhere in the page parses text as
// markup: strings become text nodes.

const byId = (id) => document.getElementById(id);

// What cannot be seen or turns its neighbours around: control, bidirectional and invisible
// characters, tags and variation selectors beyond the common ones. Tab, newline, and the joiners
// that scripts and emoji need stay as they are.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]/gu;

/** A new element with children: strings, nodes, or lists of them; null is left out. */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Text as nodes, in which hidden characters stand as their numbers. */
function shown(text) {
  const nodes = [];
  let begin = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > begin) nodes.push(text.slice(begin, match.index));
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(make("span", { class: "hidden-character" }, `⟨U+${code}⟩`));
    begin = match.index + match[0].length;
  }
  if (begin < text.length) nodes.push(text.slice(begin));
  return nodes;
}

/** A number as people read it, or a dash. */
function number(value, digits) {
  if (value === null || value === undefined) return "–";
  if (digits === undefined) return String(Number(value.toPrecision(6)));
  return value.toFixed(digits);
}

/** JSON that the page carries packed: base64 of deflate. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

// Tokens of a sequence, each in its place, shaded by how unlikely it was, with a note on demand.

const CHUNK = 3000; // Tokens drawn at once; more on request.
const SHADES = [0.1, 0.5, 1, 2, 3, 5]; // From this surprise (nats) on a token has shade 1, 2, ...

function shade(surprise) {
  return SHADES.filter((from) => surprise >= from).length;
}

/** One token. `surprise`: minus its logprob, or null where it has none. */
function tokenElement([id, text, kind], surprise) {
  const classes = ["token", `kind-${kind}`];
  if (surprise !== null) classes.push(`shade-${shade(surprise)}`);
  const element = make("span", { class: classes.join(" ") });
  if (kind === "bare") element.append(String(id));
  else if (kind === "unknown") element.append(`⟨id ${id}⟩`);
  else if (kind === "partial") element.append("·");
  else {
    // A mark before each newline and tab: a lone one would have nothing to shade.
    for (const part of text.split(/([\n\t])/)) {
      if (part === "\n") element.append(make("span", { class: "newline" }, part));
      else if (part === "\t") element.append(make("span", { class: "tab" }, part));
      else if (part) element.append(...shown(part));
    }
  }
  return element;
}

/**
 * A sequence of tokens.
 * @param label what it is, for screen readers
 * @param logprobs, raw whole multiples of -unit, or undefined
 */
function tokenSequence(label, tokens, vocabulary, unit, logprobs, raw) {
  const box = make("div", { class: "tokens", dir: "auto", tabindex: 0, role: "group", "aria-label": `${label}: ${tokens.length} tokens. Arrow keys go through them.` });
  const more = make("button", { type: "button", class: "more-tokens" });
  let drawn = 0;
  function draw(count) {
    const batch = document.createDocumentFragment();
    for (const stop = Math.min(tokens.length, drawn + count); drawn < stop; drawn++) {
      const surprise = logprobs ? logprobs[drawn] * unit : null;
      batch.append(tokenElement(vocabulary[tokens[drawn]], surprise));
    }
    box.append(batch);
    const left = tokens.length - drawn;
    more.textContent = `Show ${Math.min(left, CHUNK)} of ${left} more tokens`;
    more.hidden = left === 0;
  }
  more.addEventListener("click", () => draw(CHUNK));
  draw(CHUNK);

  function describe(element) {
    const at = Array.prototype.indexOf.call(box.children, element);
    const [id, , kind] = vocabulary[tokens[at]];
    const lines = [`token ${at + 1} of ${tokens.length}, id ${id}`];
    if (kind === "control") lines.push("control token");
    if (kind === "partial") lines.push("first part of a character that a later token ends");
    if (kind === "unknown") lines.push("the tokenizer has no such id");
    if (logprobs) {
      const logprob = -logprobs[at] * unit;
      lines.push(`logprob ${(logprob || 0).toFixed(3)} (probability ${probability(logprob)})`);
    }
    if (raw) lines.push(`raw logprob ${(-raw[at] * unit || 0).toFixed(3)}`);
    return lines.join("\n");
  }
  withNotes(box, describe);
  return [box, more];
}

function probability(logprob) {
  const share = Math.exp(logprob);
  return share >= 0.001 ? `${(100 * share).toFixed(1)}%` : share.toExponential(1);
}

/** Shows a note on the token under the pointer, or on the one that arrow keys went to. */
function withNotes(box, describe) {
  const note = byId("note");
  let current = null;
  function point(element) {
    current?.classList.remove("current");
    current = element;
    note.hidden = current === null;
    if (!current) return;
    current.classList.add("current");
    note.textContent = describe(current);
    const spot = current.getClientRects()[0] ?? current.getBoundingClientRect();
    const left = Math.min(spot.left, document.documentElement.clientWidth - note.offsetWidth - 8);
    const below = spot.bottom + 6;
    const fits = below + note.offsetHeight < document.documentElement.clientHeight;
    note.style.left = `${Math.max(8, left)}px`;
    note.style.top = `${fits ? below : spot.top - note.offsetHeight - 6}px`;
  }
  box.addEventListener("pointerover", (event) => point(event.target.closest(".token")));
  box.addEventListener("pointerleave", () => point(null));
  box.addEventListener("blur", () => point(null));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (event.key === "Escape") point(null);
    if (!step) return;
    event.preventDefault();
    point(current === null ? box.firstElementChild : current[step] ?? current);
    current?.scrollIntoView({ block: "nearest" });
  });
}

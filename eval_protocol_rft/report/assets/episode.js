// Episodes of several turns: what was sampled and what came between, segment by segment.

const sampledParts = (episode) => episode.segments.flat().filter((part) => part.logprobs);

const counted = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;

/** Facts of the whole episode; `sampled` tokens of all turns. */
function episodeFacts(episode, sampled) {
  return [
    counted(episode.turns, "turn"),
    `stop reason ${episode.stop_reason}`,
    counted(episode.segments.length, "segment"),
    counted(sampled, "sampled token"),
  ];
}

/** The parts in order, as many as have about CHUNK tokens; more on request. */
function episodeElements(each, vocabulary, unit) {
  const { segments, turns, rewrites, conversation } = each.episode;
  const box = make("div", { class: "episode" });
  const more = make("button", { type: "button", class: "more-tokens" });
  const waiting = segments.flatMap((parts, k) => parts.map((part, i) => ({ part, opens: i === 0 ? k : 0 })));
  const sampled = sampledParts(each.episode);
  if (!sampled.every((part) => part.turn)) {
    box.append(make("p", { class: "warning" }, `Where each turn begins cannot be told: ${counted(sampled.length, "run")} of sampled tokens, ${counted(turns, "turn")}.`));
  }
  function draw() {
    for (let tokens = 0; waiting.length && tokens < CHUNK;) {
      const { part, opens } = waiting.shift();
      if (opens) box.append(...segmentStart(rewrites?.[opens - 1]));
      box.append(partElement(part, each.index, vocabulary, unit));
      tokens += part.tokens.length;
    }
    more.textContent = `Show more (${counted(waiting.filter(({ part }) => part.logprobs).length, "turn")} left)`;
    more.hidden = waiting.length === 0;
  }
  more.addEventListener("click", draw);
  draw();
  const stored = conversation === undefined ? [] : [make("h4", null, "Stored conversation"),
    make("div", { class: "plain", dir: "auto" }, shown(conversation))];
  return [box, more, ...stored];
}

/** Where a segment but the first begins, and what the template did with what had been sent. */
function segmentStart(rewrite) {
  const line = make("p", { class: "segment-start" }, "history rewritten by the chat template: new segment");
  if (!rewrite) return [line];
  // Excerpts: what is before is alike, and what is behind was too long to keep.
  const quoted = (text) => make("q", null, shown(`…${text.replaceAll("\n", "↵")}…`));
  return [line, make("p", { class: "rewrite", dir: "auto" }, quoted(rewrite.kept), " became ", quoted(rewrite.rendered))];
}

function partElement({ tokens, logprobs, raw_logprobs: raw, turn, reward }, completion, vocabulary, unit) {
  if (!logprobs) {
    const sequence = tokenSequence(`Completion ${completion}, not trained on`, tokens, vocabulary, unit);
    return make("section", { class: "between" }, sequence);
  }
  const name = turn ? `Turn ${turn}` : "Sampled";
  const said = reward === undefined ? "" : ` · step reward ${number(reward)}`;
  return make("section", { class: "turn" }, make("h4", null, make("b", null, name), `${said} · ${counted(tokens.length, "token")}`),
    tokenSequence(`Completion ${completion}, ${name}`, tokens, vocabulary, unit, logprobs, raw));
}

/** What environment and processor noted of the episode. */
function episodeMetrics({ metrics }) {
  if (metrics === undefined) return null;
  return make("div", { class: "score" }, make("p", null, make("b", null, "episode")), metricsElement(metrics));
}

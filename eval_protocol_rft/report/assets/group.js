// A prompt group as it opens below its line: prompt, completions, their scores and failures.

const COMPLETIONS = 32; // Drawn at once; more on request.

let vocabularyOnce = null;

/** What a group holds; unpacked when first asked for. */
async function groupContents(position, index) {
  try {
    vocabularyOnce ??= unpacked("vocabulary");
    const [detail, vocabulary] = await Promise.all([unpacked(`group-${position}`), vocabularyOnce]);
    return groupElement(detail, vocabulary, index);
  } catch (error) {
    return make("p", { class: "notice" }, `This browser cannot unpack the group: ${error.message}`);
  }
}

function groupElement(detail, vocabulary, index) {
  const box = make("div", { class: "group" }, legend(detail));
  for (const [i, tokens] of detail.prompts.entries()) {
    const name = detail.prompts.length > 1 ? `Prompt ${i + 1}` : "Prompt";
    const sequence = tokenSequence(name, tokens, vocabulary, index.logprob_unit);
    box.append(part(`${name}: ${tokens.length} tokens, not trained on`, "prompt", sequence));
  }
  if (detail.prompt_text !== undefined) {
    const text = make("div", { class: "plain", dir: "auto" }, shown(detail.prompt_text));
    box.append(part("Prompt as the data set has it", "prompt", [text]));
  }
  if (detail.ground_truth !== undefined) {
    const text = make("div", { class: "plain", dir: "auto" }, shown(detail.ground_truth));
    box.append(part("Ground truth", "truth", [text]));
  }
  const list = make("div", { class: "completions" });
  const more = make("button", { type: "button" });
  let drawn = 0;
  function draw() {
    const next = detail.completions.slice(drawn, drawn + COMPLETIONS);
    list.append(...next.map((each) => completionElement(each, detail, vocabulary, index)));
    drawn += next.length;
    const left = detail.completions.length - drawn;
    more.textContent = `Show ${Math.min(left, COMPLETIONS)} of ${left} more completions`;
    more.hidden = left === 0;
  }
  more.addEventListener("click", draw);
  draw();
  box.append(list, more);
  return box;
}

function part(title, kind, children) {
  return make("section", { class: `part ${kind}` }, make("h3", null, title), children);
}

function legend(detail) {
  const episodes = detail.completions.some((each) => each.episode);
  const scored = episodes || detail.completions.some((each) => each.logprobs);
  const bounds = [0, ...SHADES];
  const steps = bounds.map((from, i) =>
    make("span", { class: `token shade-${i}` }, i === 0 ? "0" : `−${from}`));
  return make("p", { class: "legend" },
    make("span", null, make("span", { class: "sample prompt" }, "prompt"), episodes ? " and what comes between turns: not trained on" : " not trained on"),
    make("span", null, make("span", { class: "sample sampled" }, "sampled"), " trained on"),
    scored ? make("span", { class: "scale" }, "logprob at most ", steps) : null,
    make("span", null, make("span", { class: "token kind-control" }, "control"), " token"));
}

function completionElement(each, detail, vocabulary, index) {
  const title = make("h3", null, `Completion ${each.index}`);
  const head = make("header", null, title, badges(each, index), facts(each, index.logprob_unit));
  if (each.failure) {
    return make("article", { class: "completion failed" }, head, failureElement(each.failure));
  }
  const text = make("div", { class: "text" });
  if (each.tokens) {
    const sequence = tokenSequence(`Completion ${each.index}`, each.tokens, vocabulary,
      index.logprob_unit, each.logprobs, each.raw_logprobs);
    text.append(...sequence);
  }
  if (each.episode) text.append(...episodeElements(each, vocabulary, index.logprob_unit));
  if (each.truncated) text.append(make("p", { class: "cut" }, "✂ cut off at the most tokens allowed"));
  if (each.response !== undefined) {
    const known = (each.tokens ?? each.episode?.segments[0][0].tokens)?.some((token) => vocabulary[token][2] !== "bare");
    const stored = each.episode ? "Stored text of the first turn" : "Stored text";
    const why = known ? `${stored}: not what the tokenizer gives for these ids` : stored;
    text.append(make("h4", { class: known ? "warning" : null }, why),
      make("div", { class: "plain", dir: "auto" }, shown(each.response)));
  }
  const aside = make("aside", null, scoresElement(each, index), each.episode ? episodeMetrics(each.episode) : null);
  return make("article", { class: "completion" }, head, make("div", { class: "sides" }, text, aside));
}

function badges(each, index) {
  if (each.failure) return make("span", { class: "badge bad" }, "failed");
  const said = each.scores?.find((score) => score.column === index.columns[index.column]);
  const reward = said?.reward;
  const list = [];
  if (reward === undefined) list.push(make("span", { class: "badge unknown" }, "unscored"));
  else if (reward >= index.pass_threshold) list.push(make("span", { class: "badge good" }, `passed ${number(reward)}`));
  else list.push(make("span", { class: "badge bad" }, `reward ${number(reward)}`));
  if (each.truncated) list.push(make("span", { class: "badge cut-badge" }, "truncated"));
  return list;
}

function failureElement(failure) {
  const facts = [["kind", failure.kind], ["HTTP status", failure.status], ["attempts", failure.attempts]];
  return make("div", { class: "failure" },
    make("p", { class: "plain", dir: "auto" }, shown(failure.message)), factList(facts));
}

function scoresElement(each, index) {
  const said = new Map((each.scores ?? []).map((score) => [score.column, score]));
  return index.columns.map((column) => {
    const score = said.get(column);
    return make("div", { class: "score" },
      make("p", null, make("b", null, column), " ", score?.reward === undefined ? "unscored" : number(score.reward)),
      score?.error === undefined ? null : make("p", { class: "warning", dir: "auto" }, shown(score.error)),
      score?.reason === undefined ? null : make("p", { class: "reason", dir: "auto" }, shown(score.reason)),
      score?.metrics === undefined ? null : metricsElement(score.metrics));
  });
}

/** Further scores: plain values by name, the structured ones by their score and reason. */
function metricsElement(text) {
  const rows = Object.entries(JSON.parse(text)).map(([name, value]) => {
    const structured = value !== null && typeof value === "object" && typeof value.score === "number";
    const rest = structured ? value.reason : null;
    return [name, structured ? number(value.score) + (rest ? ` (${rest})` : "") : JSON.stringify(value)];
  });
  return make("details", { class: "metrics", open: rows.length <= 4 }, make("summary", null, "metrics"), factList(rows));
}

function facts(each, unit) {
  const { tokens, episode, finish_reason: reason, policy_version: version, seconds, seed } = each;
  const logprobs = episode ? sampledParts(episode).flatMap((part) => part.logprobs) : each.logprobs;
  const [last, first] = episode ? [" of the last turn", " of the first turn"] : ["", ""];
  const mean = logprobs?.length ? (-unit * logprobs.reduce((a, b) => a + b, 0)) / logprobs.length : null;
  const known = [
    ...(episode ? episodeFacts(episode, logprobs.length) : []),
    tokens && `${tokens.length} tokens`,
    mean !== null && `mean logprob ${number(mean || 0, 3)}`,
    reason && `finish reason${last} ${reason}`,
    seed !== undefined && `seed${first} ${seed}`,
    seconds !== undefined && `${number(seconds, 2)} s`,
    version && `policy version${first} ${version}`,
  ].filter(Boolean);
  return make("span", { class: "facts-line" }, shown(known.join(" · ")));
}

function factList(facts) {
  const known = facts.filter(([, value]) => value !== null && value !== undefined);
  return make("dl", { class: "small" }, known.map(([name, value]) =>
    [make("dt", null, shown(name)), make("dd", null, shown(String(value)))]));
}

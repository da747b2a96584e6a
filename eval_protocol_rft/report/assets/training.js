// Tells the values of the step under the pointer, or of the one that arrow keys went to, and marks
// that step in every chart.

const run = JSON.parse(byId("series").textContent);
const charts = [...document.querySelectorAll("svg[data-chart]")];
const note = byId("note");
const cursors = charts.map((chart) => {
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", run.top);
  line.setAttribute("y2", run.bottom);
  line.style.display = "none";
  chart.append(line);
  return line;
});

const stepsOf = (series) => (series.evaluated ? run.evaluations : run.steps);

/** All steps that a chart has something to tell of, in order. */
const told = new Map(charts.map((chart) => {
  const steps = new Set();
  for (const series of run.charts[chart.dataset.chart]) {
    series.values.forEach((value, i) => value !== null && steps.add(stepsOf(series)[i]));
  }
  return [chart, [...steps].sort((a, b) => a - b)];
}));
const places = { true: new Map(run.evaluations.map((s, i) => [s, i])), false: new Map(run.steps.map((s, i) => [s, i])) };

function nearest(steps, wanted) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - steps[low - 1] <= steps[low] - wanted ? low - 1 : low;
}

function xOf(step) {
  return run.left + ((step - run.low) / (run.high - run.low)) * (run.right - run.left);
}

let current = null; // The step that is told of.

function hide() {
  current = null;
  note.hidden = true;
  for (const line of cursors) line.style.display = "none";
}

function tell(chart, step) {
  current = step;
  for (const line of cursors) {
    line.style.display = "";
    line.setAttribute("x1", xOf(step));
    line.setAttribute("x2", xOf(step));
  }
  const lines = [`step ${step}`];
  for (const series of run.charts[chart.dataset.chart]) {
    const place = places[series.evaluated].get(step);
    // A series that is not measured at this step has a gap here.
    if (place !== undefined) lines.push(`${series.name}: ${number(series.values[place])}`);
  }
  note.textContent = lines.join("\n");
  note.hidden = false;
  const box = chart.getBoundingClientRect();
  const at = box.left + (xOf(step) / chart.viewBox.baseVal.width) * box.width;
  const fits = at + 12 + note.offsetWidth < document.documentElement.clientWidth;
  note.style.left = `${Math.max(8, fits ? at + 12 : at - 12 - note.offsetWidth)}px`;
  note.style.top = `${Math.max(8, box.top + 8)}px`;
}

for (const chart of charts) {
  const steps = told.get(chart);
  if (!steps.length) continue;
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    const wanted = run.low + ((x - run.left) / (run.right - run.left)) * (run.high - run.low);
    tell(chart, steps[nearest(steps, wanted)]);
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    const place = current === null ? (move > 0 ? 0 : steps.length - 1) : nearest(steps, current) + move;
    tell(chart, steps[Math.max(0, Math.min(steps.length - 1, place))]);
  });
}

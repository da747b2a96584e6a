// Puts the page together: what was chosen, and what is drawn from it.

const index = JSON.parse(byId("index").textContent);
index.column = 0; // Which reward column the page shows.
const state = { sort: 0, down: false, filter: "all", find: "" };
const table = groupsTable(byId("prompts"), index, state, draw);
const more = byId("more");
let places = [];
let drawn = 0;

function draw() {
  places = selected(index, state);
  drawn = table.draw(places);
  tell();
}

function tell() {
  const all = index.groups.length;
  byId("count").textContent = places.length === all ? `${all} prompts` : `${places.length} of ${all} prompts`;
  const left = places.length - drawn;
  more.hidden = left === 0;
  more.textContent = `Show ${Math.min(left, LINES)} of ${left} more prompts`;
}

more.addEventListener("click", () => {
  drawn = table.draw(places, drawn);
  tell();
});
byId("find").addEventListener("input", (event) => {
  state.find = event.target.value;
  draw();
});
byId("filters").addEventListener("change", (event) => {
  state.filter = event.target.value;
  draw();
});
byId("columns")?.addEventListener("change", (event) => {
  index.column = Number(event.target.value);
  for (const view of document.querySelectorAll("[data-column]")) {
    view.hidden = view.dataset.column !== event.target.value;
  }
  draw();
  table.refresh();
});
draw();
byId("tools").hidden = false;
byId("needs-script").hidden = true;

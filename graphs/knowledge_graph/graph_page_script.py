"""What the page of a knowledge graph looks like, and what it does when one types, clicks, drags and zooms."""

STYLE = """<style>
body { max-width: 84rem; } #kg { display: grid; grid-template-columns: minmax(0, 1fr) 24rem; gap: 1.5rem; }
#kg svg { width: 100%; background: #fff; border: 1px solid #e4e4e0; border-radius: 6px;
          touch-action: none; cursor: grab; }
#kg circle { cursor: pointer; stroke: #fff; stroke-width: calc(1px / var(--zoom, 1)); }
#kg line { stroke: #7d848e; } #kg line.says { stroke: #d9742b; }
#kg text { font: calc(11px / var(--zoom, 1)) system-ui, sans-serif; fill: #22252a; pointer-events: none;
           paint-order: stroke; stroke: #fff; stroke-width: calc(3px / var(--zoom, 1)); }
#kg .later { display: none; } #kg .faint { opacity: .12; }
#kg .chosen { stroke: #22252a; stroke-width: calc(3px / var(--zoom, 1)); }
#kg line.near { stroke-opacity: .7; }
#legend { display: flex; gap: 1.2rem; align-items: center; color: #5a6069; font-size: .9rem; margin-bottom: .4rem; }
#legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .4rem; }
#zoom { margin-left: auto; } #zoom button { font: inherit; min-width: 2.2rem; cursor: pointer; }
#kg input { font: inherit; width: 100%; box-sizing: border-box; padding: .45rem .7rem; border: 1px solid #c9cbc6;
            border-radius: 6px; } #side { max-height: 46rem; overflow-y: auto; overflow-wrap: anywhere; }
#found button, #side button { font: inherit; color: #2f6db3; background: none; border: 0; padding: .1rem 0;
                             cursor: pointer; text-align: left; display: block; }
#side blockquote { margin: .7rem 0; padding-left: .8rem; border-left: 3px solid #e4e4e0; }
#side h3 { margin: 1rem 0 .2rem; } #side small, #found small { color: #5a6069; }
@media (max-width: 60rem) { #kg { display: block; } }
</style>
"""

# Names are written where they are clear of those written before: of the chosen node and its neighbours, or by rank.
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent), svg = document.querySelector("#kg svg");
const circles = [...svg.querySelectorAll("circle")], lines = [...svg.querySelectorAll("line")];
const words = [...svg.querySelectorAll("text")], side = document.getElementById("side");
const found = document.getElementById("found"), search = document.getElementById("search");
const home = svg.getAttribute("viewBox").split(" ").map(Number), most = 40;
const spots = circles.map(c => ["cx", "cy", "r"].map(name => +c.getAttribute(name)));
const near = data.nodes.map(() => new Map());
let view = [...home], chosen = null;
data.edges.forEach(([a, b, weight]) => { near[a].set(b, weight); near[b].set(a, weight); });
function add(parent, tag, text) {
  const element = document.createElement(tag); element.textContent = text; parent.append(element); return element;
}
function button(parent, index, text) { add(parent, "button", text).onclick = () => { choose(index); centre(index); }; }
function heaviest(index) {
  return [...near[index]].sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([other]) => other);
}
function name() {
  const zoom = home[2] / view[2], taken = [];
  const asked = chosen === null ? data.order.slice(0, 80 * zoom * zoom) : [chosen, ...heaviest(chosen)];
  words.forEach(word => word.classList.add("later"));
  for (const index of asked) {
    const [x, y, r] = spots[index], word = words[index], gap = r / Math.sqrt(zoom) + 2 / zoom;
    const width = (6.2 * word.textContent.length + 4) / zoom, flip = x + gap + width > view[0] + view[2];
    const left = flip ? x - gap - width : x + gap, box = [left, y - 7 / zoom, left + width, y + 7 / zoom];
    if (x < view[0] || y < view[1] || x > view[0] + view[2] || y > view[1] + view[3]) continue;
    if (taken.some(b => b[0] < box[2] && box[0] < b[2] && b[1] < box[3] && box[1] < b[3])) continue;
    if (taken.push(box) > most + 20 * (zoom - 1)) break;
    word.setAttribute("x", flip ? x - gap : left); word.setAttribute("text-anchor", flip ? "end" : "start");
    word.setAttribute("y", y + 4 / zoom); word.classList.remove("later");
  }
}
function look(next) {
  const width = Math.min(home[2], Math.max(home[2] / 32, next[2])), height = width * home[3] / home[2];
  view = [Math.min(Math.max(next[0], home[0]), home[0] + home[2] - width),
          Math.min(Math.max(next[1], home[1]), home[1] + home[3] - height), width, height];
  const zoom = home[2] / width;
  svg.setAttribute("viewBox", view.join(" ")); svg.style.setProperty("--zoom", zoom);
  circles.forEach((c, i) => c.setAttribute("r", spots[i][2] / Math.sqrt(zoom)));
  name();
}
function closer(factor, x = view[0] + view[2] / 2, y = view[1] + view[3] / 2) {
  const width = Math.min(home[2], Math.max(home[2] / 32, view[2] / factor)), share = width / view[2];
  look([x - (x - view[0]) * share, y - (y - view[1]) * share, width]);
}
function centre(index) {
  look([spots[index][0] - view[2] / 2, spots[index][1] - view[3] / 2, view[2]]);
}
function mark() {
  const kept = i => chosen === null || i === chosen || near[chosen].has(i);
  circles.forEach((c, i) => { c.classList.toggle("faint", !kept(i)); c.classList.toggle("chosen", i === chosen); });
  lines.forEach((l, i) => {
    const ours = data.edges[i][0] === chosen || data.edges[i][1] === chosen;
    l.classList.toggle("faint", chosen !== null && !ours); l.classList.toggle("near", ours);
  });
  name();
}
function choose(index) {
  chosen = index; mark();
  if (!search.value.trim()) found.replaceChildren();
  const node = data.nodes[index];
  side.replaceChildren(); add(side, "h2", node.name);
  add(side, "small", node.label + ", " + node.count + " mentions. " + node.aliases.join(" | "));
  const list = add(side, "div", ""); list.id = "near";
  heaviest(index).slice(0, 12).forEach(other => {
    button(list, other, data.nodes[other].name + " (" + near[index].get(other) + ")");
  });
  const said = data.says.filter(([a, b]) => a === index || b === index).slice(0, 12);
  if (said.length) add(side, "h3", "What verbs say");
  said.forEach(([a, b, relation, weight, place, sentence]) => {
    const times = weight > 1 ? " (" + weight + ")" : "";
    const words = data.nodes[a].name + " \u2013 " + relation + " \u2192 " + data.nodes[b].name + times;
    button(side, a === index ? b : a, words); add(side, "blockquote", sentence); add(side, "small", place);
  });
  if (said.length) add(side, "h3", "Sentences");
  node.sentences.forEach(([place, sentence]) => {
    add(side, "blockquote", sentence); add(side, "small", place);
  });
}
circles.forEach((circle, index) => { circle.onclick = () => { if (!dragged) choose(index); }; });
function offer() {
  const asked = search.value.trim().toLowerCase(); found.replaceChildren();
  if (!asked) add(found, "small", "What most leads to, by PageRank:");
  data.order.map(index => [data.nodes[index], index])
    .filter(([node]) => [node.name, ...node.aliases].some(name => name.toLowerCase().includes(asked)))
    .slice(0, 20).forEach(([node, index]) => button(found, index, node.name));
}
search.oninput = offer;
search.onkeydown = event => {
  if (event.key === "Enter" && search.value.trim()) found.querySelector("button")?.onclick();
};
let held = null, dragged = false;
function scale() { return view[2] / svg.getBoundingClientRect().width; }
svg.addEventListener("wheel", event => {
  event.preventDefault();
  const corner = svg.getBoundingClientRect(), by = scale();
  closer(Math.exp(-event.deltaY / 400), view[0] + (event.clientX - corner.left) * by,
         view[1] + (event.clientY - corner.top) * by);
}, { passive: false });
svg.onpointerdown = event => { held = [event.clientX, event.clientY, ...view]; dragged = false; };
window.onpointerup = () => { held = null; };
svg.onpointermove = event => {
  if (!held) return;
  const [x, y] = [event.clientX - held[0], event.clientY - held[1]];
  dragged = dragged || Math.abs(x) + Math.abs(y) > 4;
  if (dragged) look([held[2] - x * scale(), held[3] - y * scale(), view[2]]);
};
svg.onclick = event => {
  if (event.target !== svg || dragged) return;
  chosen = null; side.replaceChildren(); mark(); offer();
};
document.getElementById("closer").onclick = () => closer(1.6);
document.getElementById("farther").onclick = () => closer(1 / 1.6);
document.getElementById("all").onclick = () => look(home);
look(home); offer();
"""

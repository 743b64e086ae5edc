"""The page's style sheet and its few lines of JavaScript.

Colours of lines are distinct under the common colour deficiencies and differ in their dashes too;
their contrast with the background is at least 3, that of text 4.5, which a test computes.
"""

LIGHT = {
    "ground": "#ffffff", "raised": "#f6f7f9", "text": "#1b1f24", "quiet": "#57606a",
    "rule": "#d5dae0", "grid": "#e6e9ee",
    "s0": "#0067a5", "s1": "#c2470a", "s2": "#007a5a", "s3": "#a33e80",
    "s4": "#8a6400", "s5": "#4054b2", "s6": "#6b4c3b", "s7": "#3d3d3d", "s8": "#b3123f",
}  # fmt: skip
DARK = {
    "ground": "#14171c", "raised": "#1d2128", "text": "#e8eaed", "quiet": "#a3acb8",
    "rule": "#3a414b", "grid": "#2a3038",
    "s0": "#5db4f0", "s1": "#f2914f", "s2": "#3fc79a", "s3": "#e293c4",
    "s4": "#e6c045", "s5": "#9fb0ff", "s6": "#cfa58c", "s7": "#d0d0d0", "s8": "#ff7a8a",
}  # fmt: skip
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2", "9 3 2 3 2 3", "5 2 1 2")
STYLES = range(len(DASHES))


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    + "".join(
        f".s{i}{{stroke:var(--s{i});stroke-dasharray:{DASHES[i]}}}.t{i}{{fill:var(--s{i})}}"
        f".f{i}{{fill:var(--s{i})}}circle.s{i}{{fill:var(--s{i});stroke:none}}"
        for i in STYLES
    )
    + """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:0 20px 40px;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header{padding:22px 0 4px}
h1,h3,p,li,summary{overflow-wrap:anywhere}
h1{font-size:26px;line-height:1.2;margin:0}
h2{font-size:19px;margin:34px 0 12px;padding-bottom:5px;border-bottom:1px solid var(--rule)}
h3{font-size:15px;margin:0 0 4px}
header p{margin:6px 0 0;color:var(--quiet)}
.badge{border:1px solid var(--rule);border-radius:10px;padding:1px 9px;color:var(--text);
background:var(--raised)}
.b-failed,.b-hung{border-color:var(--s1);color:var(--s1)}
.b-done{border-color:var(--s2);color:var(--s2)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:10px;
margin:16px 0 0}
.tiles div{background:var(--raised);border:1px solid var(--rule);border-radius:6px;padding:8px 12px}
dt{font-size:13px;color:var(--quiet)}
dd{margin:0;font-size:18px;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px;
align-items:start}
.figure{margin:0;padding:14px 16px;background:var(--raised);border:1px solid var(--rule);
border-radius:6px;min-width:0;position:relative}
.wide{grid-column:1/-1}
.on-narrow{display:none !important}
@media(max-width:1000px){.on-narrow{display:block !important}.on-wide{display:none !important}}
.absent{margin:12px 0 0;padding:0;list-style:none;font-size:13.5px;color:var(--quiet)}
.absent strong{color:var(--text);font-weight:600}
.scroll{overflow-x:auto}
.chart{display:block;width:100%;height:auto}
.on-narrow,.figure:not(.wide) .chart{max-width:620px}
.on-narrow.slim{max-width:420px}
.legend li{min-width:0}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:2px 0 4px;padding:0;
font-size:13px}
.legend svg{vertical-align:middle;margin-right:6px}
.note{font-size:13px;color:var(--quiet);margin:4px 0 0}
.line{fill:none;stroke-width:1.9;stroke-linejoin:round}
.faint{stroke-width:1;opacity:.75}
.part{stroke:var(--raised);stroke-width:1}
.blank{fill:var(--ground);stroke:var(--quiet)}
.box{fill:var(--ground);stroke:var(--grid)}
path.grid{fill:none;stroke:var(--grid)}
path.axis{stroke:var(--quiet)}
path.level{stroke:var(--quiet);stroke-dasharray:3 3}
path.cross{stroke:var(--quiet);stroke-width:1}
text{fill:var(--text);font-size:12px}
text.tick,text.small{fill:var(--quiet);font-size:11.5px;font-variant-numeric:tabular-nums}
text.small{font-size:10.5px}
text.name{font-weight:600}
.on-narrow text,.figure:not(.wide) text{font-size:11px}
.on-narrow text.tick,.figure:not(.wide) text.tick,.on-narrow text.small{font-size:10.5px}
@media(max-width:520px){body{padding:0 10px 30px}.figure{padding:10px 8px}
.on-narrow text,.figure:not(.wide) text{font-size:13px}
.on-narrow text.tick,.figure:not(.wide) text.tick,.on-narrow:not(.slim) text.small{font-size:12px}}
details{margin-top:8px;font-size:14px}
summary{cursor:pointer;color:var(--quiet)}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:3px 16px 3px 0;border-bottom:1px solid var(--grid);font-weight:400;
vertical-align:top;max-width:60ch;overflow-wrap:break-word}
thead th{font-weight:600;border-color:var(--rule)}
tbody th{color:var(--quiet)}
details .scroll{max-height:340px;overflow:auto;margin-top:6px}
pre{background:var(--raised);border:1px solid var(--rule);border-radius:6px;padding:12px 16px;
overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}
footer{margin-top:36px;font-size:13px;color:var(--quiet)}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);margin:0}
.read{position:absolute;pointer-events:none;background:var(--ground);border:1px solid var(--rule);
border-radius:4px;padding:4px 9px;font-size:12.5px;white-space:pre-wrap;overflow-wrap:anywhere;
z-index:2;max-width:calc(100% - 8px);font-variant-numeric:tabular-nums}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
@media print{body{max-width:none;padding:0}.figure,pre{break-inside:avoid;background:none}
.read,script{display:none}.grid{grid-template-columns:1fr 1fr}}
"""
)

# Reads the lines' own coordinates back into values: no number is in the page twice.
READOUT = """
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [x0, x1, px0, px1] = svg.dataset.x.split(" ").map(Number);
  const [y0, y1, py0, py1] = svg.dataset.y.split(" ").map(Number);
  const log = svg.dataset.log === "1", figure = svg.closest(".figure");
  const lines = [...svg.querySelectorAll("path[data-name]")].map(path => ({
    name: path.dataset.name,
    points: path.getAttribute("d").match(/[-.0-9]+,[-.0-9]+/g).map(p => p.split(",").map(Number)),
  }));
  const xOf = p => x0 + (p - px0) / (px1 - px0) * (x1 - x0);
  const yOf = p => { const s = (p - py0) / (py1 - py0);
    return log ? y0 * (y1 / y0) ** s : y0 + s * (y1 - y0); };
  const text = v => Math.abs(v) >= 1e5 ? v.toExponential(3) : String(Number(v.toPrecision(4)));
  const ns = "http://www.w3.org/2000/svg";
  const read = figure.querySelector(".read") ?? document.createElement("div");
  const cross = document.createElementNS(ns, "path");
  read.className = "read"; read.hidden = true; read.setAttribute("aria-hidden", "true");
  cross.setAttribute("class", "cross"); figure.append(read); svg.append(cross);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const size = Math.min(box.width / view.width, box.height / view.height);
    const at = (event.clientX - box.left - (box.width - size * view.width) / 2) / size;
    const near = lines.map(line => line.points.reduce((best, p) =>
      Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best));
    if (!near.length) return;
    const px = near.reduce((best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best)[0];
    cross.setAttribute("d", `M${px},${Math.min(py0, py1)}V${Math.max(py0, py1)}`);
    read.textContent = svg.dataset.label + " " + text(xOf(px)) + lines.map((line, i) =>
      `\\n${line.name}  ${text(yOf(near[i][1]))}`).join("");
    read.hidden = false;
    const frame = figure.getBoundingClientRect();
    const left = event.clientX - frame.left + 16;
    const most = frame.width - read.offsetWidth - 8;
    read.style.left = (left > most ? Math.max(4, left - read.offsetWidth - 32) : left) + "px";
    read.style.top = event.clientY - frame.top + 12 + "px";
  });
  svg.addEventListener("pointerleave", () => { read.hidden = true; cross.removeAttribute("d"); });
}
"""

# A served page loads itself anew when the server's version is not its own, VERSION. What was
# unfolded, the keyboard's place and the place that was read survive that.
RELOAD = """
let storage = null;
try { storage = sessionStorage; } catch { /* blocked: the page begins at its top again */ }
const folds = new Map([...document.querySelectorAll("details")].map(fold => [
  (fold.closest("figure")?.querySelector("h3").id ?? "") + " " +
    fold.firstElementChild.textContent.split(",")[0], fold]));
const kept = JSON.parse(storage?.getItem("place") ?? "null");
history.scrollRestoration = "manual";
if (kept !== null) {
  for (const name of kept.open) folds.get(name)?.setAttribute("open", "");
  folds.get(kept.focus)?.firstElementChild.focus({preventScroll: true});
  scrollTo(0, kept.y);
}
addEventListener("pagehide", () => {
  const names = test => [...folds].filter(([, fold]) => test(fold)).map(([name]) => name);
  const [focus] = names(fold => fold.firstElementChild === document.activeElement);
  storage?.setItem("place", JSON.stringify({open: names(fold => fold.open), focus, y: scrollY}));
});
setInterval(async () => {
  try {
    const answer = await fetch("version", {cache: "no-store"});
    if (answer.ok && await answer.text() !== "VERSION") location.reload();
  } catch { /* the server was stopped: the page stays as it is */ }
}, EVERY);
"""

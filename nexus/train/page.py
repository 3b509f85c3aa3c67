"""How the report looks and moves: one style sheet and one script, inline, with nothing fetched from anywhere."""

POLICY = ("default-src 'none'; img-src data: 'self'; media-src 'self'; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'")

STYLE = """
:root{color-scheme:light dark;--ground:#f7f7f5;--card:#fff;--ink:#1d1f23;--quiet:#6a6f78;--line:#e4e4df;
--accent:#3b5bdb;--soft:#3b5bdb1a;--good:#2b8a3e;--warn:#b35c00;--warn-ground:#fff4e5}
@media(prefers-color-scheme:dark){:root{--ground:#131417;--card:#1b1d21;--ink:#e8e9eb;--quiet:#9aa0aa;--line:#2d3037;
--accent:#8ea6ff;--soft:#8ea6ff24;--good:#69db7c;--warn:#ffb866;--warn-ground:#33261a}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:6px 14px;margin-bottom:4px}
h1{font-size:26px;letter-spacing:-.02em;margin:0}
h2{font-size:13px;font-weight:600;letter-spacing:.06em;text-transform:uppercase;color:var(--quiet);margin:36px 0 10px}
h3{font-size:14px;font-weight:600;margin:0 0 8px}
.quiet{color:var(--quiet)}
.pill{font-size:12px;font-weight:600;padding:2px 10px;border-radius:99px;background:var(--soft);color:var(--accent)}
.pill.done{color:var(--good);background:color-mix(in srgb,var(--good) 14%,transparent)}
.bar{height:4px;border-radius:2px;background:var(--line);margin:14px 0 20px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px}
.card,.tile{background:var(--card);border:1px solid var(--line);border-radius:12px}
.card{padding:16px}
.tile{padding:12px 16px}
.tile b{display:block;font-size:21px;font-weight:600;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.tile span{font-size:12px;color:var(--quiet)}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:14px}
.curves .wide{grid-column:1/-1}
.curve{display:block;width:100%;height:auto;overflow:visible}
.curve text{font-size:11px;fill:var(--quiet);font-variant-numeric:tabular-nums}
.curve .grid{stroke:var(--line)}
.curve polyline{fill:none;stroke:var(--accent);stroke-linejoin:round;vector-effect:non-scaling-stroke}
.curve .raw{stroke-width:1;opacity:.3}
.curve .smooth{stroke-width:2}
.hover rect{fill:transparent}
.hover path{stroke:var(--quiet);stroke-dasharray:3 3;opacity:0}
.hover circle{fill:var(--accent);stroke:var(--card);stroke-width:1.5;opacity:0}
.hover:hover path,.hover:hover circle{opacity:1}
.warnings{background:var(--warn-ground);border:1px solid color-mix(in srgb,var(--warn) 35%,transparent);
border-radius:12px;padding:12px 16px 12px 34px;margin:16px 0 0;color:var(--warn)}
.stage{display:flex;justify-content:center;background:var(--ground);border-radius:8px;padding:14px;overflow:auto}
.stage a{display:block;width:min(100%,640px)}
.stage a[hidden]{display:none}
.stage img{display:block;width:100%;height:auto;border-radius:8px;image-rendering:pixelated}
.scrub{display:flex;align-items:center;gap:14px;margin-top:12px}
.scrub input{flex:1;accent-color:var(--accent)}
.scrub output{min-width:110px;text-align:right;font-variant-numeric:tabular-nums}
button{font:inherit;font-size:13px;color:var(--ink);background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:5px 12px;cursor:pointer}
button:hover{border-color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.command{display:flex;gap:12px;align-items:center}
code,pre{font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
.command code{flex:1;overflow:auto;white-space:pre}
table{width:100%;border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--quiet);padding:6px 12px 6px 0;border-bottom:1px solid var(--line)}
td{padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
td.digest{font:12px ui-monospace,Menlo,Consolas,monospace;color:var(--quiet);word-break:break-all}
td.number,th.number{text-align:right}
.settings{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:14px;align-items:start}
.settings td:last-child{word-break:break-word}
a{color:var(--accent)}
@media(max-width:640px){.wide .curve text{font-size:19px}}
@media print{.scrub,button{display:none}}
"""

SCRIPT = """
for (const box of document.querySelectorAll('[data-scrub]')) {
  const frames = box.querySelectorAll('.stage a'), range = box.querySelector('input'),
        label = box.querySelector('output'), play = box.querySelector('button');
  let timer = 0;
  const show = () => { frames.forEach((f, i) => f.hidden = i != range.value);
                       label.textContent = frames[range.value].dataset.label; };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = 'Play'; };
  range.addEventListener('input', () => { stop(); show(); });
  play.addEventListener('click', () => {
    if (timer) return stop();
    if (range.value == range.max) range.value = 0;
    play.textContent = 'Pause'; show();
    timer = setInterval(() => { if (range.value == range.max) return stop(); range.value++; show(); }, 500);
  });
}
for (const button of document.querySelectorAll('[data-copy]')) button.addEventListener('click', () => {
  const code = button.parentNode.querySelector('code'), range = document.createRange();
  range.selectNodeContents(code); getSelection().removeAllRanges(); getSelection().addRange(range);
  const told = ok => { button.textContent = ok ? 'Copied' : 'Selected';
                       setTimeout(() => button.textContent = 'Copy', 1500); };
  if (!navigator.clipboard) return told(false);
  navigator.clipboard.writeText(code.textContent).then(() => told(true), () => told(false));
});
"""

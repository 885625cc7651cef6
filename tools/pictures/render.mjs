// Draws both dashboards as PNG:  node render.mjs PROMETHEUS [MINUTES]
//
// Asks Prometheus what Grafana would ask for “All”, puts the answers beside the dashboard into a page that app.jsx draws
// with Grafana's own components, and lets a headless Chromium take its picture.

import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const [prometheus = "http://127.0.0.1:9090", minutes = "15"] = process.argv.slice(2);
const WIDTH = 1400;
const POINTS = 400;
// Seconds, as in deploy/prometheus.yml.
const SCRAPE = 5;
// Grafana's grid: cells of 30 px with 8 px between them.
const CELL = 38;
const HEAD = 64;

const out = process.env.GLASSGATE_PICTURES ?? join(here, "out");
const end = Math.floor(Date.now() / 1000);
const start = end - Number(minutes) * 60;
const step = Math.max(1, Math.round((end - start) / POINTS));

async function ask(path, fields) {
  const url = `${prometheus}/api/v1/${path}?${new URLSearchParams(fields)}`;
  const answer = await fetch(url).catch(() => {
    throw new Error(`no Prometheus answers at ${prometheus}; \`make demo\` starts one, or name yours: make pictures PROMETHEUS=http://…`);
  });
  const body = await answer.json();
  if (body.status !== "success") throw new Error(`${body.error}\n  ${fields.query}`);
  return body.data.result;
}

/** What Grafana puts for its variables: a rate spans four scrapes or more, and every other variable is “All”. */
function substituted(query) {
  return query
    .replaceAll("$__rate_interval", `${Math.max(4 * SCRAPE, step + SCRAPE)}s`)
    .replaceAll("$__range", `${end - start}s`)
    .replaceAll(/\$[a-z]+/g, ".+");
}

async function answered(dashboard) {
  for (const panel of dashboard.panels) {
    for (const target of panel.targets ?? []) {
      const query = substituted(target.expr);
      target.result = target.instant
        ? await ask("query", { query, time: end })
        : await ask("query_range", { query, start, end, step });
    }
  }
  return dashboard;
}

mkdirSync(out, { recursive: true });
const loader = Object.fromEntries([".svg", ".png", ".woff", ".woff2", ".ttf"].map((kind) => [kind, "dataurl"]));
await build({
  entryPoints: [join(here, "app.jsx")],
  outfile: join(out, "app.js"),
  bundle: true,
  jsx: "automatic",
  define: { "process.env.NODE_ENV": '"production"', global: "window" },
  external: ["fs", "path"],
  logLevel: "error",
  loader,
});

for (const name of ["overview", "cost"]) {
  const file = join(here, "../../dashboards", `${name}.json`);
  const dashboard = await answered(JSON.parse(readFileSync(file)));
  const rows = Math.max(...dashboard.panels.map((panel) => panel.gridPos.y + panel.gridPos.h));
  const data = JSON.stringify({ dashboard, start, end, width: WIDTH }).replaceAll("<", "\\u003c");
  const page = join(out, `${name}.html`);
  writeFileSync(
    page,
    `<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="app.css"><body style="margin:0"><div id="root"></div>` +
      `<script>window.shown = ${data}</script><script src="app.js"></script>`,
  );
  const picture = join(here, "../../dashboards", `${name}.png`);
  rmSync(picture, { force: true });
  execFileSync("chromium", [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
    `--window-size=${WIDTH},${HEAD + rows * CELL + 8}`, "--virtual-time-budget=8000", `--screenshot=${picture}`, `file://${page}`,
  ], { stdio: ["ignore", "ignore", process.env.DEBUG ? "inherit" : "ignore"] });
  console.log(`dashboards/${name}.png: ${Math.round(readFileSync(picture).length / 1024)} KiB, ${minutes} minutes until ${new Date(end * 1000).toISOString()}`);
}

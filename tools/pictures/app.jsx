// One dashboard, drawn with Grafana's components: what `window.shown` holds, at the places that its grid says.

import { createRoot } from "react-dom/client";
import {
  applyFieldOverrides, createTheme, dateTime, FieldColorModeId, FieldType, getDisplayProcessor, getDisplayValueAlignmentFactors, Registry, ThemeContext, toDataFrame,
} from "@grafana/data";
import { BarGauge, BigValue, GlobalStyles, PanelChrome, TimeSeries } from "@grafana/ui";
import "uplot/dist/uPlot.min.css";

const theme = createTheme({ colors: { mode: "dark" } });
const { dashboard, start, end, width } = window.shown;
const timeRange = { from: dateTime(start * 1000), to: dateTime(end * 1000), raw: { from: "now-15m", to: "now" } };

const COLUMN = (width - 8) / 24;
const ROW = 38;
const HEAD = 64;
// What PanelChrome takes for itself.
const TITLE = 34;
const PADDING = 16;
// A table's line.
const LINE = 30;

function place({ x, y, w, h }) {
  return { left: 8 + x * COLUMN, top: HEAD + y * ROW, width: w * COLUMN - 8, height: h * ROW - 8 };
}

function legend(format, labels) {
  return format.replaceAll(/\{\{(\w+)\}\}/g, (_, name) => labels[name] ?? "");
}

/** A thresholds' first step goes down without end; JSON says null for that. */
function defaults(panel) {
  const { thresholds, ...rest } = panel.fieldConfig.defaults;
  return { ...rest, thresholds: { ...thresholds, steps: (thresholds?.steps ?? []).map((step) => ({ ...step, value: step.value ?? -Infinity })) } };
}

function isByThreshold(panel) {
  return panel.type === "bargauge" || panel.options.colorMode === "value";
}

/** One frame a series, on every step of the range: a hole is a hole. What was asked of one moment has one value. */
function frames(panel) {
  const config = {
    ...defaults(panel),
    color: { mode: isByThreshold(panel) ? FieldColorModeId.Thresholds : FieldColorModeId.PaletteClassic },
  };
  const step = (end - start) / 400;
  const made = panel.targets.flatMap((target) => target.result.map(({ metric, value, values = [value] }) => {
    const times = [];
    const numbers = [];
    for (const [time, value] of values) {
      const before = times.at(-1) / 1000;
      if (before && time - before > 3 * Math.max(1, Math.round(step))) {
        times.push((before + 1) * 1000);
        numbers.push(null);
      }
      times.push(time * 1000);
      numbers.push(Number(value));
    }
    const name = legend(target.legendFormat, metric) || panel.title;
    return toDataFrame({
      refId: target.refId,
      fields: [
        { name: "Time", type: FieldType.time, values: times, config: {} },
        { name: "Value", type: FieldType.number, values: numbers, labels: metric, config: { ...structuredClone(config), displayName: name } },
      ],
    });
  }));
  return applyFieldOverrides({
    data: made, fieldConfig: { defaults: {}, overrides: [] }, fieldConfigRegistry: new Registry(() => []),
    replaceVariables: (text) => text, theme, timeZone: "utc",
  });
}

function Nothing({ children = "No data" }) {
  return <div style={{ display: "grid", placeItems: "center", height: "100%", color: theme.colors.text.secondary }}>{children}</div>;
}

function last(frame) {
  const field = frame.fields[1];
  return { field, shown: field.display(field.values.at(-1)) };
}

function Stat({ panel, width, height }) {
  const [frame] = frames(panel);
  if (!frame) return <Nothing>{panel.fieldConfig.defaults.noValue}</Nothing>;
  const { shown } = last(frame);
  return (
    <BigValue
      theme={theme} width={width} height={height} value={shown}
      colorMode={isByThreshold(panel) ? "value" : "none"} graphMode="none" justifyMode="auto" textMode="value" text={panel.options.text}
    />
  );
}

function Lines({ panel, width, height }) {
  const made = frames(panel);
  if (!made.length) return <Nothing>{panel.fieldConfig.defaults.noValue}</Nothing>;
  return <TimeSeries frames={made} timeRange={timeRange} timeZone="utc" width={width} height={height} legend={panel.options.legend} options={{}} />;
}

function Bars({ panel, width, height }) {
  const made = frames(panel);
  if (!made.length) return <Nothing />;
  const each = Math.min(48, height / made.length);
  const values = made.map((frame) => ({ ...last(frame).shown, title: frame.fields[1].config.displayName }));
  const alignment = getDisplayValueAlignmentFactors(values.map((display) => ({ display })));
  return made.map((frame, number) => {
    const { field } = last(frame);
    return (
      <BarGauge
        key={field.config.displayName} theme={theme} width={width} height={each - 8} field={field.config} display={field.display}
        value={values[number]} alignmentFactors={alignment} orientation="horizontal" displayMode="gradient" showUnfilled itemSpacing={8} text={panel.options.text}
      />
    );
  });
}

/** Counts a cell, from cumulative buckets. */
function Heatmap({ panel, width, height }) {
  const buckets = panel.targets[0].result
    .map(({ metric, values }) => ({ edge: Number(metric.le.replace("+Inf", "Infinity")), values }))
    .sort((a, b) => a.edge - b.edge);
  if (!buckets.length) return <Nothing />;
  const below = buckets.map(({ values }) => new Map(values.map(([time, value]) => [time, Number(value)])));
  const counts = buckets.map(({ values }, row) => values.map(([time, value]) => [time, Math.max(0, Number(value) - (below[row - 1]?.get(time) ?? 0))]));
  const used = counts.map((cells, row) => cells.some(([, count]) => count > 1e-9) ? row : -1).filter((row) => row >= 0);
  const [first, top] = [Math.min(...used), Math.max(...used)];
  const most = Math.max(...counts.flat().map(([, count]) => count));
  const unit = getDisplayProcessor({ field: { type: FieldType.number, config: { unit: panel.options.yAxis.unit } }, theme });
  const [axis, head, foot] = [56, 8, 20];
  const cell = (height - head - foot) / (top - first + 1);
  const x = (time) => axis + ((time - start) / (end - start)) * (width - axis);
  const columns = 60;
  const wide = (width - axis) / columns;
  const text = { fill: theme.colors.text.secondary, fontSize: 12 };
  const spoken = (value) => { const { text, suffix } = unit(value); return `${text}${suffix ?? ""}`; };
  const hours = Array.from({ length: 5 }, (_, n) => start + ((n + 0.5) * (end - start)) / 5);
  return (
    <svg width={width} height={height}>
      {counts.slice(first, top + 1).map((cells, row) => {
        const sums = Array(columns).fill(0);
        for (const [time, count] of cells) {
          const column = Math.min(columns - 1, Math.floor((x(time) - axis) / wide));
          sums[column] = Math.max(sums[column], count);
        }
        return sums.map((sum, column) => sum > 1e-9 && (
          <rect key={`${row} ${column}`} x={axis + column * wide} y={head + (top - first - row) * cell} width={wide - 1} height={cell - 1}
            fill={`hsl(${38 - 22 * Math.sqrt(sum / most)} 95% ${22 + 38 * Math.sqrt(sum / most)}%)`} />
        ));
      })}
      {buckets.slice(first, top + 1).map(({ edge }, row) => (
        <text key={edge} x={axis - 6} y={head + (top - first - row) * cell + 5} textAnchor="end" {...text}>{Number.isFinite(edge) ? spoken(edge) : ""}</text>
      ))}
      {hours.map((time) => <text key={time} x={x(time)} y={height - 4} textAnchor="middle" {...text}>{new Date(time * 1000).toISOString().slice(11, 16)}</text>)}
    </svg>
  );
}

/** Rows with the same labels are one: what the transformation `merge` does. */
function Table({ panel, height }) {
  const { renameByName, indexByName } = panel.transformations.find(({ id }) => id === "organize").options;
  const units = Object.fromEntries(panel.fieldConfig.overrides.map(({ matcher, properties }) => [matcher.options, properties[0].value]));
  const labels = Object.keys(indexByName).filter((name) => !(name in renameByName));
  const columns = Object.values(renameByName);
  const rows = new Map();
  for (const target of panel.targets) {
    for (const { metric, value } of target.result) {
      const key = labels.map((name) => metric[name]).join("|");
      rows.set(key, { ...rows.get(key), ...metric, [target.legendFormat]: Number(value[1]) });
    }
  }
  const spoken = (name, value) => {
    if (value === undefined) return "–";
    const display = getDisplayProcessor({ field: { type: FieldType.number, config: { unit: units[name], decimals: units[name] === "locale" ? 0 : undefined } }, theme });
    const { prefix = "", text, suffix = "" } = display(value);
    return `${prefix}${text}${suffix}`;
  };
  const line = { height: LINE - 1, padding: "0 10px", borderBottom: `1px solid ${theme.colors.border.weak}`, whiteSpace: "nowrap" };
  const right = { ...line, textAlign: "right", fontVariantNumeric: "tabular-nums" };
  const head = { color: theme.colors.text.secondary, fontWeight: 500 };
  const sorted = [...rows.values()].sort((a, b) => b[columns[0]] - a[columns[0]]);
  const fitting = sorted.slice(0, Math.floor((height - LINE) / LINE));
  return (
    <table style={{ width: "100%", borderCollapse: "collapse", fontSize: 13 }}>
      <thead><tr>
        {labels.map((name) => <th key={name} style={{ ...line, ...head, textAlign: "left" }}>{name}</th>)}
        {columns.map((name) => <th key={name} style={{ ...right, ...head }}>{name}</th>)}
      </tr></thead>
      <tbody>{fitting.map((row) => (
        <tr key={labels.map((name) => row[name]).join("|")}>
          {labels.map((name) => <td key={name} style={line}>{row[name]}</td>)}
          {columns.map((name) => <td key={name} style={right}>{spoken(name, row[name])}</td>)}
        </tr>
      ))}</tbody>
    </table>
  );
}

const KINDS = { stat: Stat, timeseries: Lines, bargauge: Bars, heatmap: Heatmap, table: Table };

function Panel({ panel }) {
  const at = place(panel.gridPos);
  if (panel.type === "row") {
    return <h2 style={{ position: "absolute", ...at, margin: 0, fontSize: 16, lineHeight: "30px", fontWeight: 500 }}>{panel.title}</h2>;
  }
  const Kind = KINDS[panel.type];
  return (
    <div style={{ position: "absolute", ...at }}>
      <PanelChrome title={panel.title} width={at.width} height={at.height}>
        {() => <Kind panel={panel} width={at.width - PADDING} height={at.height - TITLE - PADDING} />}
      </PanelChrome>
    </div>
  );
}

function Dashboard() {
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <main style={{ position: "relative", background: theme.colors.background.canvas, color: theme.colors.text.primary, minHeight: "100vh" }}>
        <header style={{ display: "flex", alignItems: "baseline", justifyContent: "space-between", padding: "18px 16px" }}>
          <span style={{ fontSize: 20, fontWeight: 500 }}>{dashboard.title}</span>
          <span style={{ color: theme.colors.text.secondary }}>Last {Math.round((end - start) / 60)} minutes · all routes, models and variants</span>
        </header>
        {dashboard.panels.map((panel) => <Panel key={panel.id} panel={panel} />)}
      </main>
    </ThemeContext.Provider>
  );
}

createRoot(document.getElementById("root")).render(<Dashboard />);

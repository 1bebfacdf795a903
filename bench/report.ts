/** What a run found: tables for the terminal, and a page of tables and plots that needs nothing beside itself. */

export interface Table {
  readonly title: string;
  readonly note?: string;
  readonly headings: readonly string[];
  readonly rows: readonly (readonly string[])[];
}

export interface Series {
  readonly name: string;
  readonly points: readonly (readonly [x: number, y: number])[];
  readonly isDashed?: boolean;
}

export interface LinePlot {
  readonly kind: 'lines';
  readonly title: string;
  readonly x: string;
  readonly y: string;
  readonly isLogX?: boolean;
  readonly isLogY?: boolean;
  readonly series: readonly Series[];
}

export interface BarPlot {
  readonly kind: 'bars';
  readonly title: string;
  readonly x: string;
  readonly parts: readonly string[];
  /** One bar, its parts in the order of `parts`. */
  readonly bars: readonly { readonly name: string; readonly values: readonly number[] }[];
}

/** A figure that was promised. */
export interface Verdict {
  readonly what: string;
  readonly target: string;
  readonly measured: string;
  readonly isMet: boolean;
}

export interface Findings {
  readonly tables: readonly Table[];
  readonly plots: readonly (LinePlot | BarPlot)[];
  readonly verdicts: readonly Verdict[];
}

export function toText({ title, note, headings, rows }: Table): string {
  const widths = headings.map((heading, column) =>
    Math.max(heading.length, ...rows.map((row) => (row[column] ?? '').length)),
  );
  const line = (cells: readonly string[]) =>
    cells
      .map((cell, column) =>
        column === 0 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0),
      )
      .join('  ')
      .trimEnd();
  const body = [headings, ...rows].map(line).join('\n');
  return `\n${title}\n${note === undefined ? '' : `${note}\n`}${body}\n`;
}

export const verdictTable = (verdicts: readonly Verdict[]): Table => ({
  title: 'Against the targets',
  headings: ['what', 'target', 'measured', ''],
  rows: verdicts.map(({ what, target, measured, isMet }) => [
    what,
    target,
    measured,
    isMet ? 'met' : 'MISSED',
  ]),
});

const COLOURS = ['#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf', '#8c564b'];
const WIDTH = 760;
const HEIGHT = 340;
const MARGIN = { left: 70, right: 20, top: 16, bottom: 50 };
const INNER_WIDTH = WIDTH - MARGIN.left - MARGIN.right;
const INNER_HEIGHT = HEIGHT - MARGIN.top - MARGIN.bottom;

const escapeHtml = (text: string) =>
  text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;');

const short = (value: number) => String(Number(value.toPrecision(3)));

/** Round values, some five of them, that span the data; powers of ten (and 2, 5) on a logarithmic axis. */
function ticks(min: number, max: number, isLog: boolean): number[] {
  if (isLog) {
    const all = [];
    for (let power = Math.floor(Math.log10(min)); 10 ** power <= max; power++) {
      for (const factor of max / min > 200 ? [1] : [1, 2, 5]) all.push(factor * 10 ** power);
    }
    return all.filter((value) => value >= min * 0.999 && value <= max * 1.001);
  }
  const rough = (max - min) / 5;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = ([1, 2, 5, 10].find((factor) => factor * unit >= rough) as number) * unit;
  return Array.from({ length: Math.floor((max - min) / step + 1.001) }, (_, index) => min + index * step);
}

function axis(values: readonly number[], isLog: boolean, length: number) {
  const min = isLog ? Math.min(...values) : 0;
  const max = Math.max(...values) * (isLog ? 1 : 1.05);
  const place = (value: number) =>
    isLog
      ? (Math.log(value / min) / Math.log(max / min || Math.E)) * length
      : ((value - min) / (max - min || 1)) * length;
  return { place, ticks: ticks(min, max, isLog) };
}

function linePlot({ title, x, y, isLogX = false, isLogY = false, series }: LinePlot): string {
  const isShown = ([px, py]: readonly [number, number]) =>
    Number.isFinite(px) && Number.isFinite(py) && (!isLogX || px > 0) && (!isLogY || py > 0);
  const points = series.flatMap((one) => one.points.filter(isShown));
  if (points.length === 0) return '<p>nothing to plot</p>';
  const horizontal = axis(
    points.map(([px]) => px),
    isLogX,
    INNER_WIDTH,
  );
  const vertical = axis(
    points.map(([, py]) => py),
    isLogY,
    INNER_HEIGHT,
  );
  const left = (value: number) => MARGIN.left + horizontal.place(value);
  const top = (value: number) => MARGIN.top + INNER_HEIGHT - vertical.place(value);
  const lines = series.map((one, index) => {
    const colour = COLOURS[index % COLOURS.length];
    const shown = one.points.filter(isShown);
    const path = shown.map(([px, py]) => `${left(px).toFixed(1)},${top(py).toFixed(1)}`).join(' ');
    const dots = one.isDashed
      ? ''
      : shown
          .map(
            ([px, py]) =>
              `<circle cx="${left(px).toFixed(1)}" cy="${top(py).toFixed(1)}" r="3" fill="${colour}"><title>${escapeHtml(one.name)}: ${short(px)} → ${short(py)}</title></circle>`,
          )
          .join('');
    return `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="2"${one.isDashed ? ' stroke-dasharray="6 4"' : ''}/>${dots}`;
  });
  const grid = [
    ...horizontal.ticks.map(
      (value) =>
        `<line x1="${left(value)}" x2="${left(value)}" y1="${MARGIN.top}" y2="${MARGIN.top + INNER_HEIGHT}"/><text x="${left(value)}" y="${MARGIN.top + INNER_HEIGHT + 16}" text-anchor="middle">${short(value)}</text>`,
    ),
    ...vertical.ticks.map(
      (value) =>
        `<line x1="${MARGIN.left}" x2="${MARGIN.left + INNER_WIDTH}" y1="${top(value)}" y2="${top(value)}"/><text x="${MARGIN.left - 6}" y="${top(value) + 4}" text-anchor="end">${short(value)}</text>`,
    ),
  ];
  return svg(title, grid, lines, x, y) + legend(series.map(({ name }) => name));
}

function barPlot({ title, x, parts, bars }: BarPlot): string {
  const lengths = bars.map(({ values }) => values.reduce((a, b) => a + b, 0));
  const { place, ticks: marks } = axis(lengths, false, INNER_WIDTH - 60);
  const leftEdge = MARGIN.left + 60;
  const height = INNER_HEIGHT / bars.length;
  const shapes = bars.map(({ name, values }, row) => {
    let begin = 0;
    const top = MARGIN.top + row * height + height * 0.15;
    const pieces = values.map((value, index) => {
      const piece = `<rect x="${(leftEdge + place(begin)).toFixed(1)}" y="${top.toFixed(1)}" width="${place(value).toFixed(1)}" height="${(height * 0.7).toFixed(1)}" fill="${COLOURS[index % COLOURS.length]}"><title>${escapeHtml(parts[index] ?? '')}: ${short(value)}</title></rect>`;
      begin += value;
      return piece;
    });
    return `<text x="${leftEdge - 6}" y="${(top + height * 0.35 + 4).toFixed(1)}" text-anchor="end">${escapeHtml(name)}</text>${pieces.join('')}`;
  });
  const grid = marks.map(
    (value) =>
      `<line x1="${leftEdge + place(value)}" x2="${leftEdge + place(value)}" y1="${MARGIN.top}" y2="${MARGIN.top + INNER_HEIGHT}"/><text x="${leftEdge + place(value)}" y="${MARGIN.top + INNER_HEIGHT + 16}" text-anchor="middle">${short(value)}</text>`,
  );
  return svg(title, grid, shapes, x, '') + legend(parts);
}

const svg = (title: string, grid: readonly string[], shapes: readonly string[], x: string, y: string) =>
  `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${escapeHtml(title)}"><g class="grid">${grid.join('')}</g>${shapes.join('')}
<text x="${MARGIN.left + INNER_WIDTH / 2}" y="${HEIGHT - 12}" text-anchor="middle">${escapeHtml(x)}</text>
<text transform="translate(16 ${MARGIN.top + INNER_HEIGHT / 2}) rotate(-90)" text-anchor="middle">${escapeHtml(y)}</text></svg>`;

const legend = (names: readonly string[]) =>
  `<p class="legend">${names.map((name, index) => `<span><i style="background:${COLOURS[index % COLOURS.length]}"></i>${escapeHtml(name)}</span>`).join('')}</p>`;

const htmlTable = ({ title, note, headings, rows }: Table) => `<h3>${escapeHtml(title)}</h3>
${note === undefined ? '' : `<p>${escapeHtml(note)}</p>`}
<table><tr>${headings.map((heading) => `<th>${escapeHtml(heading)}</th>`).join('')}</tr>
${rows.map((row) => `<tr>${row.map((cell) => `<td${cell === 'MISSED' ? ' class="missed"' : ''}>${escapeHtml(cell)}</td>`).join('')}</tr>`).join('\n')}</table>`;

export function toHtml(title: string, machine: Table, findings: Findings): string {
  const plots = findings.plots.map(
    (plot) =>
      `<figure><h3>${escapeHtml(plot.title)}</h3>${plot.kind === 'lines' ? linePlot(plot) : barPlot(plot)}</figure>`,
  );
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>${escapeHtml(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 860px; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
figure { margin: 2rem 0 } svg { width: 100%; font-size: 12px } svg text { fill: #444 }
.grid line { stroke: #e4e4e4 } .missed { color: #b00; font-weight: bold }
.legend span { margin-right: 1.2em; font-size: 13px } .legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px }
</style></head><body>
<h1>${escapeHtml(title)}</h1>
${htmlTable(machine)}
${htmlTable(verdictTable(findings.verdicts))}
${plots.join('\n')}
${findings.tables.map(htmlTable).join('\n')}
</body></html>
`;
}

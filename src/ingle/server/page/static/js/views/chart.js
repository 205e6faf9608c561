// A chart of the last minutes, drawn by uPlot, which is loaded with the first.

import { h } from '../dom.js';
import { onTheme } from '../theme.js';
import { locale, number, t } from '../words.js';

const SPAN_S = 120;
let loading = null;

function library() {
  loading ??= (async () => {
    const href = new URL('../../vendor/uplot/uPlot.min.css', import.meta.url);
    document.head.append(Object.assign(document.createElement('link'), { rel: 'stylesheet', href }));
    return (await import('../../vendor/uplot/uPlot.esm.js')).default;
  })();
  return loading;
}

export class Chart {
  constructor({ name, series, share = false, whole = false }) {
    Object.assign(this, { name, series, share, whole, history: [] });
    this.legend = h('dl', { class: 'legend' });
    this.canvas = h('div', { class: 'canvas', role: 'img' });
    this.element = h(
      'section',
      { class: 'chart', 'data-chart': name },
      h('header', {}, h('h2', {}, t(`chart_of_${name}`)), this.legend),
      this.canvas,
    );
    this.resized = new ResizeObserver(() => this.plot?.setSize(this.size()));
    this.resized.observe(this.canvas);
    this.unheard = onTheme(() => {
      this.plot?.destroy();
      this.plot = null;
      this.draw(this.history);
    });
  }

  async draw(history) {
    this.history = history;
    const latest = history.at(-1);
    if (!latest) return;
    this.legend.replaceChildren(
      ...this.series.map(([field, label], at) =>
        h('div', { class: `series-${at}` }, h('dt', {}, t(label)), h('dd', {}, this.shown(latest[field]))),
      ),
    );
    this.canvas.setAttribute(
      'aria-label',
      this.series.map(([field, label]) => `${t(label)}: ${this.shown(latest[field])}`).join(', '),
    );
    const uPlot = await library();
    if (this.closed) return;
    if (!this.plot) this.plot = new uPlot(this.options(), this.data(), this.canvas);
    else this.plot.setData(this.data());
  }

  data() {
    return [
      this.history.map(({ at }) => at),
      ...this.series.map(([field]) =>
        this.history.map((point) => (point[field] === null ? null : point[field] * (this.share ? 100 : 1))),
      ),
    ];
  }

  shown(value) {
    if (value === null || value === undefined) return '–';
    return this.share ? `${number(value * 100, 1)} %` : number(value, this.whole ? 0 : 1);
  }

  size() {
    return { width: Math.max(this.canvas.clientWidth, 100), height: 150 };
  }

  options() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: colour('--quiet'),
      grid: { stroke: colour('--line'), width: 1 },
      ticks: { show: false },
      font: `11px ${colour('--sans')}`,
    };
    const clock = (seconds) =>
      new Date(seconds * 1000).toLocaleTimeString(locale(), {
        hour: '2-digit',
        minute: '2-digit',
        second: '2-digit',
        hour12: false,
      });
    return {
      ...this.size(),
      padding: [8, 8, 0, 0],
      cursor: { show: false },
      legend: { show: false },
      scales: {
        x: { time: false, range: (plot, low, high) => [high - SPAN_S, high] },
        y: { range: (plot, low, high) => [0, this.share ? 100 : Math.max(this.whole ? 4 : 1, (high ?? 0) * 1.15)] },
      },
      axes: [
        { ...axis, size: 26, space: 90, values: (plot, splits) => splits.map(clock) },
        {
          ...axis,
          size: 44,
          space: 30,
          values: (plot, splits) =>
            splits.map((value) =>
              this.share
                ? `${value} %`
                : Number.isInteger(value) || !this.whole
                  ? number(value, value % 1 && value < 10 ? 1 : 0)
                  : '',
            ),
        },
      ],
      series: [
        {},
        ...this.series.map((_, at) => ({
          stroke: colour(`--series-${at}`),
          fill: at === 0 ? colour('--series-0-fill') : undefined,
          width: 1.5,
          points: { show: false },
          spanGaps: true,
        })),
      ],
    };
  }

  close() {
    this.closed = true;
    this.unheard();
    this.resized.disconnect();
    this.plot?.destroy();
  }
}

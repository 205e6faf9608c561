// What the server does now: drawn while somebody looks, of what it tells Prometheus.

import { ask, askJson } from '../api.js';
import { h } from '../dom.js';
import { between, figures, parse } from '../metrics.js';
import { findModels, models, onModels } from '../models.js';
import { bytes, locale, number, seconds, t } from '../words.js';
import { Chart } from './chart.js';

const EVERY_MS = 1000;
const LONGEST = 600; // looks, which is ten minutes
let history = []; // which outlasts a visit to a conversation
const CHARTS = [
  {
    name: 'speed',
    series: [
      ['generatedPerS', 'chart_generated'],
      ['readPerS', 'chart_read'],
    ],
  },
  {
    name: 'requests',
    series: [
      ['running', 'chart_running'],
      ['waiting', 'chart_waiting'],
    ],
    whole: true,
  },
  { name: 'kv', series: [['usage', 'chart_used']], share: true },
  { name: 'hits', series: [['hitRate', 'chart_hits']], share: true },
];

export class StatusView {
  constructor({ lead }) {
    this.tiles = h('dl', { class: 'tiles' });
    this.charts = CHARTS.map((chart) => new Chart(chart));
    this.models = h('div', { class: 'table', tabindex: '0', role: 'group', 'aria-label': t('loadedModels') });
    this.requests = h('div', { class: 'table', tabindex: '0', role: 'group', 'aria-label': t('recentRequests') });
    this.trouble = h('p', { class: 'state bad', hidden: true, role: 'alert' });
    this.element = h(
      'main',
      { id: 'main', class: 'view status' },
      h('header', { class: 'view-head' }, lead(), h('h1', { class: 'view-title', tabindex: '-1' }, t('status'))),
      h(
        'div',
        { class: 'status-body' },
        this.trouble,
        this.tiles,
        h(
          'div',
          { class: 'charts' },
          this.charts.map((chart) => chart.element),
        ),
        h('section', {}, h('h2', {}, t('loadedModels')), this.models),
        h('section', {}, h('h2', {}, t('recentRequests')), h('p', { class: 'quiet' }, t('noPrompts')), this.requests),
      ),
    );
    this.heard = [onModels(() => this.drawModels())];
    document.title = `${t('status')} · ingle`;
    this.drawModels();
    if (models.state === 'ready') findModels();
    this.look();
  }

  async look() {
    if (this.closed) return;
    if (!document.hidden) await this.now();
    this.timer = setTimeout(() => this.look(), EVERY_MS);
  }

  async now() {
    try {
      const [text, requests] = await Promise.all([
        ask('metrics').then((response) => response.text()),
        askJson('ingle/requests'),
      ]);
      if (this.closed) return;
      this.trouble.hidden = true;
      this.take(figures(parse(text), performance.now() / 1000));
      this.drawRequests(requests);
    } catch (error) {
      this.trouble.hidden = false;
      this.trouble.textContent =
        error.status === 403 ? t('needsAdmin') : error.code === 'unreachable' ? t('unreachable') : error.message;
    }
  }

  take(found) {
    const before = history.at(-1);
    const point = {
      ...found,
      at: Date.now() / 1000,
      ...(before ? between(before, found) : { generatedPerS: 0, readPerS: 0, hitRate: null }),
    };
    history = [...history.slice(1 - LONGEST), point];
    this.charts.forEach((chart) => chart.draw(history));
    const hits = found.queried ? found.hit / found.queried : 0;
    const tiles = [
      ['running', number(found.running)],
      ['waiting', number(found.waiting)],
      ['tokensPerS', number(point.generatedPerS, 1)],
      ['kvUse', percent(found.usage)],
      ['hitsInAll', percent(hits)],
      ['tokensInAll', number(found.generated)],
      ['memory', bytes(found.memory)],
      ['uptime', duration(found.uptime)],
    ];
    this.tiles.replaceChildren(
      ...tiles.map(([name, value]) =>
        h('div', { 'data-figure': name }, h('dt', {}, t(`tile_${name}`)), h('dd', {}, value)),
      ),
    );
  }

  drawModels() {
    const rows = models.cards.map(({ id, max_model_len: context, meta }) => [
      id,
      meta.family,
      number(meta.num_parameters / 1e6, 0),
      meta.dtype,
      bytes(meta.weight_bytes),
      meta.device,
      number(context),
    ]);
    const heads = ['model', 'family', 'millions', 'dtype', 'weights', 'device', 'contextLength'];
    this.models.replaceChildren(table(heads, rows, [2, 4, 6], t(`models_${models.state}`)));
  }

  drawRequests({ running, ended }) {
    const rows = [...running, ...ended]
      .slice(0, 50)
      .map((each) => [
        new Date(each.started * 1000).toLocaleTimeString(locale(), { hour12: false }),
        each.route,
        each.model,
        each.client,
        outcome(each),
        tokensIn(each),
        each.output_tokens === null ? '' : number(each.output_tokens),
        each.queue_s === null ? '' : seconds(each.queue_s),
        each.ttft_s === null ? '' : seconds(each.ttft_s),
        seconds(each.duration_s),
        speed(each),
      ]);
    const heads = [
      'time',
      'endpoint',
      'model',
      'client',
      'outcome',
      'prompt',
      'tokensOut',
      'queued',
      'ttft',
      'duration',
      'tokensPerS',
    ];
    const named = [...running, ...ended].some((each) => each.client);
    const at = heads.indexOf('client');
    const without = (row) => (named ? row : row.toSpliced(at, 1));
    this.requests.replaceChildren(
      table(without(heads), rows.map(without), named ? [5, 6, 7, 8, 9, 10] : [4, 5, 6, 7, 8, 9], t('noRequests')),
    );
  }

  isBusy() {
    return false;
  }

  focus() {
    this.element.querySelector('h1').focus();
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.heard.forEach((stop) => stop());
    this.charts.forEach((chart) => chart.close());
  }
}

function table(heads, rows, numeric, empty) {
  if (!rows.length) return h('p', { class: 'quiet' }, empty);
  const kind = (at) => ({ class: numeric.includes(at) ? 'numeric' : null });
  return h(
    'table',
    {},
    h(
      'thead',
      {},
      h(
        'tr',
        {},
        heads.map((head, at) => h('th', { scope: 'col', ...kind(at) }, t(`col_${head}`))),
      ),
    ),
    h(
      'tbody',
      {},
      rows.map((row) =>
        h(
          'tr',
          {},
          row.map((value, at) => h('td', kind(at), value)),
        ),
      ),
    ),
  );
}

function percent(share) {
  return `${number(share * 100, share > 0 && share < 0.1 ? 1 : 0)} %`;
}

function duration(value) {
  const [days, hours, minutes] = [
    Math.floor(value / 86400),
    Math.floor(value / 3600) % 24,
    Math.floor(value / 60) % 60,
  ];
  return days
    ? `${days} d ${hours} h`
    : hours
      ? `${hours} h ${minutes} min`
      : minutes
        ? `${minutes} min`
        : `${Math.floor(value)} s`;
}

function outcome(each) {
  if (each.status === null) return t('isRunning');
  return each.finish_reasons.join(', ') || String(each.status);
}

function tokensIn({ prompt_tokens: all, cached_tokens: cached }) {
  if (all === null) return '';
  return cached ? t('ofThemCached', { all: number(all), cached: number(cached) }) : number(all);
}

function speed({ output_tokens: count, ttft_s: first, duration_s: whole }) {
  return count > 1 && first !== null && whole > first ? number((count - 1) / (whole - first), 1) : '';
}

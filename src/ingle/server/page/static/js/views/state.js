// What is to be said of an answer beside its text: how far it is, why it ended, what went wrong, and how fast it came.

import { h } from '../dom.js';
import { number, seconds, t } from '../words.js';

// How far the prompt is read, that an answer was cut off, or what went wrong; null where all is well.
export function stateView(node, running) {
  if (running) {
    const { progress } = node;
    if (progress?.total) {
      const share = Math.min(1, progress.processed / progress.total);
      const bar = h('progress', { max: '1', value: share, 'aria-label': t('reading') });
      return h(
        'p',
        { class: 'state' },
        h('span', {}, t('readingPrompt', { read: number(progress.processed), all: number(progress.total) })),
        bar,
      );
    }
    if (!node.content && !node.reasoning && !node.calls.length)
      return h(
        'p',
        { class: 'state waiting' },
        h('span', { class: 'dots' }),
        h('span', { class: 'offscreen' }, t('waiting')),
      );
    return null;
  }
  if (node.error) return h('p', { class: 'state bad' }, h('span', {}, errorText(node.error)));
  const text = { length: 'cutLength', stopped: 'cutStopped', interrupted: 'cutInterrupted' }[node.finish];
  return text ? h('p', { class: 'state' }, h('span', {}, t(text))) : null;
}

export function errorText(error) {
  if (error.code === 'unreachable') return t('unreachable');
  if (error.code === 'cut_off') return error.message ? `${t('cutOff')} ${error.message}` : t('cutOff');
  if (error.code === 'settings') return `${t('badSettings')} ${error.message}`;
  if (error.status === 401) return t('keyRefused');
  return error.retryAfter ? `${error.message} ${t('retryAfter', { time: error.retryAfter })}` : error.message;
}

// `12.3 tokens/s · first token after 210 ms · 128 tokens`.
export function statsView(node, running) {
  const stats = node.stats ?? {};
  const parts = [];
  if (node.role === 'assistant' && node.model && !running) parts.push(h('span', { class: 'of-model' }, node.model));
  if (stats.perSecond) parts.push(h('span', { class: 'speed' }, t('perSecond', { count: number(stats.perSecond, 1) })));
  if (stats.ttft_s !== undefined)
    parts.push(h('span', { class: 'ttft' }, t('firstAfter', { time: seconds(stats.ttft_s) })));
  if (stats.tokens) parts.push(h('span', {}, t('tokens', { count: number(stats.tokens) })));
  const title =
    stats.promptTokens === undefined
      ? null
      : t('statsTitle', {
          prompt: number(stats.promptTokens),
          cached: number(stats.cachedTokens ?? 0),
          time: seconds(stats.total_s ?? 0),
        });
  return h('p', { class: 'stats', title }, parts);
}

// One answer of the model, as it is streamed, and how fast it comes.

import { ApiError, ask } from './api.js';
import { events } from './events.js';

const SHORTEST_S = 0.02; // of a time that a speed is told of: what comes at once says nothing of it

export function emptyAnswer() {
  return { content: '', reasoning: '', calls: [], finish: null, error: null, progress: null, stats: {} };
}

// Streams into `answer`, and calls `changed` after each event. Errors of the server and of the network end up in it.
export async function stream(body, answer, signal, changed) {
  const clock = new Clock(answer.stats);
  try {
    const response = await ask('v1/chat/completions', { method: 'POST', body, signal });
    let ended = false;
    for await (const data of events(response.body)) {
      if (data === '[DONE]') {
        ended = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, { code: chunk.error.code });
      take(chunk, answer, clock);
      changed();
    }
    if (!ended && !answer.finish) throw new ApiError('', { code: 'cut_off' });
  } catch (error) {
    if (signal.aborted) answer.finish = 'stopped';
    else answer.error = told(error);
  } finally {
    answer.progress = null;
    clock.stop();
    changed();
  }
}

function told(error) {
  if (error instanceof ApiError)
    return { message: error.message, code: error.code, status: error.status, retryAfter: error.retryAfter };
  return { message: error.name === 'TypeError' ? '' : String(error.message ?? error), code: 'cut_off' };
}

function take(chunk, answer, clock) {
  if (chunk.prompt_progress) answer.progress = chunk.prompt_progress;
  if (chunk.model) answer.model = chunk.model;
  const [choice] = chunk.choices ?? [];
  const delta = choice?.delta ?? {};
  const thought = delta.reasoning_content ?? delta.reasoning ?? '';
  answer.content += delta.content ?? '';
  answer.reasoning += thought;
  for (const call of delta.tool_calls ?? []) takeCall(answer.calls, call);
  if (choice?.finish_reason) answer.finish = choice.finish_reason;
  const says = Boolean(delta.content || thought || delta.tool_calls?.length);
  if (thought) answer.stats.thoughtFrom ??= clock.now();
  if (
    answer.stats.thoughtFrom !== undefined &&
    !answer.stats.thought_s &&
    (delta.content || delta.tool_calls?.length || choice?.finish_reason)
  ) {
    answer.stats.thought_s = clock.now() - answer.stats.thoughtFrom;
  }
  if (says) answer.progress = null;
  clock.tick(says, chunk.usage);
}

function takeCall(calls, delta) {
  const call = (calls[delta.index] ??= { id: '', name: '', arguments: '' });
  call.id ||= delta.id ?? '';
  call.name ||= delta.function?.name ?? '';
  call.arguments += delta.function?.arguments ?? '';
}

// Seconds since the request was sent, and what follows from them and from the tokens that the server counts.
class Clock {
  constructor(stats) {
    this.stats = stats;
    this.started = performance.now();
    this.tokensAtFirst = 0;
  }

  now() {
    return (performance.now() - this.started) / 1000;
  }

  tick(says, usage) {
    const { stats } = this;
    const now = this.now();
    if (usage) {
      stats.promptTokens = usage.prompt_tokens;
      stats.cachedTokens = usage.prompt_tokens_details?.cached_tokens ?? 0;
      stats.tokens = usage.completion_tokens;
    }
    if (says && stats.ttft_s === undefined) {
      stats.ttft_s = now;
      this.tokensAtFirst = usage?.completion_tokens ?? 1;
    }
    if (says) this.last = now;
    const decoded = (stats.tokens ?? 0) - this.tokensAtFirst;
    const took = (this.last ?? 0) - (stats.ttft_s ?? 0);
    if (says && decoded > 0 && took > SHORTEST_S) stats.perSecond = decoded / took;
  }

  stop() {
    delete this.stats.thoughtFrom;
    this.stats.total_s = this.now();
  }
}

// The text that Prometheus reads, and what a panel makes of it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

// Name to samples, each with its labels and its value.
export function parse(text) {
  const found = new Map();
  for (const line of text.split('\n')) {
    const match = LINE.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? '').matchAll(LABEL)].map(([, name, value]) => [name, value]));
    const samples = found.get(match[1]) ?? [];
    samples.push({ labels, value: Number(match[3]) });
    found.set(match[1], samples);
  }
  return found;
}

function sum(metrics, name, wanted = {}) {
  return (metrics.get(name) ?? [])
    .filter(({ labels }) => Object.entries(wanted).every(([label, value]) => labels[label] === value))
    .reduce((total, { value }) => total + value, 0);
}

function largest(metrics, name) {
  return Math.max(0, ...(metrics.get(name) ?? []).map(({ value }) => value));
}

// Of all models together, at the time `now` in seconds.
export function figures(metrics, now) {
  return {
    now,
    up: (metrics.get('ingle_engine_up') ?? []).every(({ value }) => value === 1),
    running: sum(metrics, 'vllm:num_requests_running'),
    waiting: sum(metrics, 'vllm:num_requests_waiting'),
    generated: sum(metrics, 'vllm:generation_tokens_total'),
    read: sum(metrics, 'ingle_engine_prompt_tokens_total'),
    queried: sum(metrics, 'vllm:prefix_cache_queries_total'),
    hit: sum(metrics, 'vllm:prefix_cache_hits_total'),
    usage: largest(metrics, 'vllm:kv_cache_usage_perc'),
    cached: sum(metrics, 'ingle_kv_pages', { state: 'cached' }),
    pages: sum(metrics, 'ingle_kv_pages'),
    memory: sum(metrics, 'ingle_resident_memory_bytes'),
    uptime: sum(metrics, 'ingle_uptime_seconds'),
    version: metrics.get('ingle_build_info')?.[0]?.labels.version ?? '',
  };
}

// What happened between two looks. A server that was started anew counts from zero.
export function between(before, after) {
  const took = after.now - before.now;
  const more = (name) => Math.max(0, after[name] - before[name]);
  const queried = more('queried');
  return {
    generatedPerS: took > 0 ? more('generated') / took : 0,
    readPerS: took > 0 ? more('read') / took : 0,
    hitRate: queried > 0 ? Math.min(1, more('hit') / queried) : null,
  };
}

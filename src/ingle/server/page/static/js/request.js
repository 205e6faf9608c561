// What the server is asked: a branch of a conversation, with the settings that somebody has made.

export const NUMBERS = {
  temperature: { min: 0, max: 2, step: 0.05 },
  top_p: { min: 0.01, max: 1, step: 0.01 },
  top_k: { min: -1, max: 1000, step: 1 },
  min_p: { min: 0, max: 1, step: 0.01 },
  repetition_penalty: { min: 0.1, max: 3, step: 0.01 },
  presence_penalty: { min: -2, max: 2, step: 0.05 },
  frequency_penalty: { min: -2, max: 2, step: 0.05 },
  max_tokens: { min: 1, max: 10000000, step: 1 },
  seed: { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
};

// Raises SyntaxError for tools or fields that are no JSON.
export function requestBody(settings, messages, { goesOn = false } = {}) {
  const body = {
    model: settings.model || undefined,
    messages: asked(settings, messages),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    return_progress: true,
  };
  for (const name of Object.keys(NUMBERS)) if (typeof settings[name] === 'number') body[name] = settings[name];
  const stop = (settings.stop ?? '').split('\n').filter(Boolean);
  if (stop.length) body.stop = stop;
  if (settings.thinking === 'on' || settings.thinking === 'off') {
    body.chat_template_kwargs = { enable_thinking: settings.thinking === 'on' };
  }
  if (settings.effort) body.reasoning_effort = settings.effort;
  if (settings.tools?.trim()) body.tools = JSON.parse(settings.tools);
  if (goesOn) Object.assign(body, { add_generation_prompt: false, continue_final_message: true });
  if (settings.extra?.trim()) Object.assign(body, JSON.parse(settings.extra));
  return body;
}

function asked(settings, messages) {
  const system = settings.system?.trim() ? [{ role: 'system', content: settings.system }] : [];
  return [...system, ...messages.map(message)];
}

function message(node) {
  if (node.role === 'tool') return { role: 'tool', tool_call_id: node.callId, content: node.content };
  if (!node.calls?.length) return { role: node.role, content: node.content };
  const calls = node.calls.map((call) => ({
    id: call.id,
    type: 'function',
    function: { name: call.name, arguments: call.arguments },
  }));
  return { role: node.role, content: node.content, tool_calls: calls };
}

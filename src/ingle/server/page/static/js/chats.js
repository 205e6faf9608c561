// Conversations that are open, and the answers that run in them, whatever is shown meanwhile.

import { emptyAnswer, stream } from './answer.js';
import { add, branch, titleFrom } from './conversation.js';
import { read, write } from './prefs.js';
import { requestBody } from './request.js';
import * as store from './store.js';

const SAVED_EVERY_MS = 1000;
const owners = new WeakMap(); // of a lane, the comparison that it is of
const runs = new Map(); // node to what stops its answer
const kept = new Map(); // id to what has been opened
const timers = new Map();
const unsaved = new Map(); // id to answers that the database has not whole
const target = new EventTarget();

// 'tree': messages came, went or were chosen; 'node': one has changed; 'list': what the sidebar shows.
export function on(kind, listener) {
  const heard = (event) => listener(event.detail);
  target.addEventListener(kind, heard);
  return () => target.removeEventListener(kind, heard);
}

function emit(kind, detail) {
  target.dispatchEvent(new CustomEvent(kind, { detail }));
}

export function owner(conversation) {
  return owners.get(conversation) ?? conversation;
}

export function lanes(record) {
  return record.lanes ?? [record];
}

// From now on changes of it are saved.
export function adopt(record) {
  kept.set(record.id, record);
  for (const lane of record.lanes ?? []) owners.set(lane, record);
  return record;
}

export async function open(id) {
  if (kept.has(id)) return kept.get(id);
  const record = await store.load(id);
  if (!record) return null;
  const rescued = read('rescued', {});
  for (const lane of lanes(record)) Object.values(lane.nodes).forEach((node) => mend(node, rescued[node.id]));
  return adopt(record);
}

// What the page had no time to save is taken from where it wrote it as it went; an answer that was running then is cut off.
function mend(node, rescued) {
  const length = ({ content, reasoning = '' }) => content.length + reasoning.length;
  if (rescued && length(rescued) >= length(node)) Object.assign(node, rescued);
  if (!node.running) return;
  delete node.running;
  node.finish = 'interrupted';
}

export function isEmpty(record) {
  return lanes(record).every((lane) => Object.keys(lane.nodes).length === 0);
}

export function touched(conversation, { now = false } = {}) {
  const record = owner(conversation);
  if (isEmpty(record)) return;
  if (now) {
    clearTimeout(timers.get(record.id));
    timers.delete(record.id);
    save(record);
  } else if (!timers.has(record.id)) {
    timers.set(record.id, setTimeout(() => touched(conversation, { now: true }), SAVED_EVERY_MS));
  }
}

async function save(record) {
  const ended = [...unsaved.values()].filter((node) => !node.running);
  if (await store.save(record)) ended.forEach((node) => unsaved.delete(node.id));
}

// All that waits to be saved. A page that goes does not wait for its database: answers are written down at once, too.
export function flush({ leaving = false } = {}) {
  if (leaving) {
    const told = [...unsaved.values()].map(({ id, content, reasoning, calls, stats, finish, error, running }) =>
      [id, { content, reasoning, calls, stats, finish, error, running }]);
    write('rescued', told.length ? Object.fromEntries(told) : null);
  }
  for (const id of [...timers.keys()]) touched(kept.get(id), { now: true });
}

export function forget(id) {
  clearTimeout(timers.get(id));
  timers.delete(id);
  const record = kept.get(id);
  if (record) lanes(record).forEach(stop);
  kept.delete(id);
}

export function isRunning(conversation) {
  return Object.values(conversation.nodes).some((node) => runs.has(node.id));
}

export function runningNode(conversation) {
  return branch(conversation).findLast((node) => runs.has(node.id)) ?? null;
}

export function stop(conversation) {
  for (const node of Object.values(conversation.nodes)) runs.get(node.id)?.abort();
}

export function say(conversation, text) {
  const record = owner(conversation);
  add(conversation, conversation.leaf, { role: 'user', content: text });
  record.updated = Date.now();
  if (!record.title) record.title = titleFrom(text);
  emit('tree', conversation);
  touched(conversation, { now: true });
  emit('list');
}

export async function send(conversation, text) {
  say(conversation, text);
  await reply(conversation);
}

// Another answer to what `node` answers.
export function again(conversation, node) {
  conversation.leaf = node.parent;
  return reply(conversation);
}

// The same message, said otherwise, on a branch of its own.
export function edit(conversation, node, text) {
  conversation.leaf = node.parent;
  if (node.role === 'user') return send(conversation, text);
  add(conversation, node.parent, { role: node.role, content: text, model: node.model, finish: 'edited' });
  emit('tree', conversation);
  touched(conversation, { now: true });
  return Promise.resolve();
}

export function giveResults(conversation, node, results) {
  node.calls.forEach((call, at) => add(conversation, conversation.leaf, { role: 'tool', callId: call.id, name: call.name, content: results[at] }));
  return reply(conversation);
}

export async function reply(conversation) {
  const asked = branch(conversation);
  const node = add(conversation, conversation.leaf, { role: 'assistant', running: true, ...emptyAnswer() });
  node.model = conversation.settings.model;
  emit('tree', conversation);
  touched(conversation, { now: true });
  await run(conversation, node, () => requestBody(conversation.settings, asked));
}

// Goes on where an answer was cut off.
export async function goOn(conversation, node) {
  const asked = branch(conversation, node.id);
  const { content, reasoning } = node;
  const more = { ...emptyAnswer(), content, reasoning };
  Object.assign(node, more, { running: true });
  emit('node', { conversation, node });
  const sent = asked.map((each) => (each === node ? { ...each, content } : each));
  await run(conversation, node, () => requestBody(conversation.settings, sent, { goesOn: true }));
}

async function run(conversation, node, body) {
  const control = new AbortController();
  runs.set(node.id, control);
  unsaved.set(node.id, node);
  emit('running', conversation);
  const changed = () => {
    emit('node', { conversation, node });
    touched(conversation);
  };
  try {
    await stream(body(), node, control.signal, changed);
  } catch (error) {
    node.error = { message: String(error.message), code: 'settings' };
  }
  runs.delete(node.id);
  delete node.running;
  conversation.updated = Date.now();
  emit('node', { conversation, node });
  emit('running', conversation);
  emit('ended', { conversation, node });
  touched(conversation, { now: true });
}

export function chosen(conversation) {
  emit('tree', conversation);
  touched(conversation, { now: true });
}

export function listChanged() {
  emit('list');
}

// New conversations begin with what was set last.
export function lastSettings() {
  return read('settings', {});
}

export function keepSettings(settings) {
  write('settings', settings);
}

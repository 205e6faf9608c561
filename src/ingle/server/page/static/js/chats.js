// Conversations that are open, and the answers that run in them, whatever is shown meanwhile.

import { emptyAnswer, stream } from './answer.js';
import { add, branch, titleFrom } from './conversation.js';
import { read, write } from './prefs.js';
import { requestBody } from './request.js';
import * as store from './store.js';

const SAVED_EVERY_MS = 1000;
const LARGEST_RESCUED = 1000000; // characters: localStorage has room for some millions
const owners = new WeakMap(); // of a lane, the comparison that it is of
const runs = new Map(); // node to what stops its answer
const kept = new Map(); // id to what has been opened
const gone = new Set(); // ids of those that were deleted, and are not to come back by an answer that ends
const timers = new Map();
const saving = new Map(); // id to how many times it is being saved
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
  gone.delete(record.id);
  for (const lane of record.lanes ?? []) owners.set(lane, record);
  return record;
}

export async function open(id) {
  if (kept.has(id)) return kept.get(id);
  const record = await store.load(id);
  if (!record) return null;
  for (const lane of lanes(record)) Object.values(lane.nodes).forEach(mend);
  return adopt(record);
}

// An answer that was running when the page went is cut off.
function mend(node) {
  if (!node.running) return;
  delete node.running;
  node.finish = 'interrupted';
}

export function isEmpty(record) {
  return lanes(record).every((lane) => Object.keys(lane.nodes).length === 0);
}

export function touched(conversation, { now = false } = {}) {
  const record = owner(conversation);
  if (isEmpty(record) || gone.has(record.id)) return;
  if (now) {
    clearTimeout(timers.get(record.id));
    timers.delete(record.id);
    save(record);
  } else if (!timers.has(record.id)) {
    timers.set(
      record.id,
      setTimeout(() => touched(conversation, { now: true }), SAVED_EVERY_MS),
    );
  }
}

async function save(record) {
  const { id } = record;
  saving.set(id, (saving.get(id) ?? 0) + 1);
  await store.save(record);
  if (saving.get(id) > 1) saving.set(id, saving.get(id) - 1);
  else saving.delete(id);
}

// All that waits to be saved.
export function flush() {
  for (const id of [...timers.keys()]) touched(kept.get(id), { now: true });
}

// A page that goes does not wait for its database: what that has not yet is written down where it is done at once.
export function leave() {
  const going = [...kept.values()].filter(
    (record) => timers.has(record.id) || saving.has(record.id) || lanes(record).some(isRunning),
  );
  const small = going.filter((record) => JSON.stringify(record).length < LARGEST_RESCUED);
  if (small.length) write('rescued', [...read('rescued', []).filter(({ id }) => !kept.has(id)), ...small]);
  flush();
}

// Takes it from there. A page that only slept has it still.
export async function rescue({ slept = false } = {}) {
  const rescued = read('rescued', []);
  if (!rescued.length) return;
  for (const record of rescued) if (!slept && record.id) await store.save(record);
  write('rescued', null);
}

export function forget(id) {
  gone.add(id);
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
  node.calls.forEach((call, at) =>
    add(conversation, conversation.leaf, { role: 'tool', callId: call.id, name: call.name, content: results[at] }),
  );
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

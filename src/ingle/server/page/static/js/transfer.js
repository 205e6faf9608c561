// Conversations as a file, and back. A file is somebody else's: what is not as expected is refused or left out.

import { newId } from './conversation.js';
import { NUMBERS } from './request.js';

export const FORMAT = 'ingle-conversations';
const ROLES = ['user', 'assistant', 'tool'];
const TEXTS = ['model', 'system', 'stop', 'thinking', 'effort', 'tools', 'extra'];

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations }, null, 1);
}

// Those in the text of a file, under new ids. Raises SyntaxError.
export function imported(text) {
  const told = JSON.parse(text);
  if (told?.format !== FORMAT || !Array.isArray(told.conversations)) throw new SyntaxError(`no ${FORMAT}`);
  return told.conversations.map((each) => (each?.kind === 'compare' ? comparison(each) : conversation(each)));
}

function comparison(given) {
  const lanes = Array.isArray(given.lanes) ? given.lanes.slice(0, 2).map(conversation) : [];
  if (lanes.length !== 2) throw new SyntaxError('a comparison has two lanes');
  return { ...head(given), kind: 'compare', lanes };
}

function conversation(given) {
  if (typeof given !== 'object' || given === null || typeof given.nodes !== 'object' || given.nodes === null) {
    throw new SyntaxError('a conversation has nodes');
  }
  const ids = new Map(Object.keys(given.nodes).map((id) => [id, newId()]));
  const nodes = {};
  for (const [id, each] of Object.entries(given.nodes)) {
    if (!ROLES.includes(each?.role)) throw new SyntaxError('a message has a role');
    nodes[ids.get(id)] = node(each, ids.get(id), ids.get(each.parent) ?? null);
  }
  const made = {
    ...head(given),
    kind: 'chat',
    settings: settings(given.settings),
    nodes,
    leaf: ids.get(given.leaf) ?? null,
  };
  if (hasCircle(made)) throw new SyntaxError('messages answer each other in a circle');
  return made;
}

function head(given) {
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  return { id: newId(), title: text(given.title), created: time(given.created), updated: time(given.updated) };
}

function node(given, id, parent) {
  const made = { id, parent, created: Number(given.created) || 0, role: given.role, content: text(given.content) };
  for (const name of ['reasoning', 'model', 'finish', 'callId', 'name'])
    if (given[name]) made[name] = text(given[name]);
  if (Array.isArray(given.calls)) {
    made.calls = given.calls.map((call) => ({
      id: text(call?.id),
      name: text(call?.name),
      arguments: text(call?.arguments),
    }));
  }
  if (typeof given.error === 'object' && given.error)
    made.error = { message: text(given.error.message), code: text(given.error.code) };
  if (typeof given.stats === 'object' && given.stats) {
    made.stats = Object.fromEntries(Object.entries(given.stats).filter(([, value]) => Number.isFinite(value)));
  }
  return made;
}

function settings(given) {
  const known = Object.entries(given ?? {}).filter(
    ([name, value]) =>
      (Object.hasOwn(NUMBERS, name) && Number.isFinite(value)) || (TEXTS.includes(name) && typeof value === 'string'),
  );
  return Object.fromEntries(known);
}

function hasCircle({ nodes }) {
  const sound = new Set();
  for (const start of Object.values(nodes)) {
    const seen = [];
    for (let at = start; at && !sound.has(at.id); at = nodes[at.parent]) {
      if (seen.includes(at.id)) return true;
      seen.push(at.id);
    }
    seen.forEach((id) => sound.add(id));
  }
  return false;
}

function text(value) {
  return typeof value === 'string' ? value : '';
}

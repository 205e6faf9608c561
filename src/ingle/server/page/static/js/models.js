// The models that the server hands out, and what it says while there is none yet.

import { BASE, askJson } from './api.js';

const RETRY_MS = 1000;
const target = new EventTarget();

export const models = { state: 'asking', cards: [], loading: null };

export function onModels(listener) {
  target.addEventListener('models', listener);
  return () => target.removeEventListener('models', listener);
}

function become(change) {
  Object.assign(models, change);
  target.dispatchEvent(new Event('models'));
}

export function cardOf(name) {
  return models.cards.find((card) => card.id === name) ?? models.cards[0] ?? null;
}

// Until they are there: a server that loads its model says how far it is.
export async function findModels() {
  try {
    const told = await askJson('v1/models');
    become({ state: 'ready', cards: told.data, loading: null });
    return;
  } catch (error) {
    if (error.status === 401) return become({ state: 'locked' });
    if (error.code !== 'unreachable' && error.status !== 503)
      return become({ state: 'failed', loading: { detail: error.message } });
    become({
      state: error.status === 503 ? 'loading' : 'unreachable',
      loading: error.status === 503 ? await progress() : null,
    });
  }
  setTimeout(findModels, RETRY_MS);
}

async function progress() {
  try {
    return await (await fetch(new URL('health', BASE), { cache: 'no-store' })).json();
  } catch {
    return null;
  }
}

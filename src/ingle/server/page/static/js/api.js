// The server: its addresses, the key that it asks for, and its errors.

import { read, readOnce, write, writeOnce } from './prefs.js';

// This file is BASE/page/VERSION/js/api.js, whatever a proxy has put before.
export const BASE = new URL('../../../', import.meta.url);

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

export function apiKey() {
  return readOnce('key') ?? read('key');
}

export function keepKey(key, remember) {
  write('key', remember ? key : null);
  writeOnce('key', remember ? null : key);
}

let askForKey = null;
let asking = null;

// `ask(wrong)` resolves once somebody has given a key, to false if they would not; `wrong` is one that was refused.
export function onKeyWanted(ask) {
  askForKey = ask;
}

// A response that is well. Raises ApiError, or what `signal` was aborted with.
export async function ask(path, { method = 'GET', body, signal, quiet = false } = {}) {
  for (;;) {
    const key = apiKey();
    const headers = { Accept: 'application/json, text/event-stream;q=0.9, */*;q=0.8' };
    if (body !== undefined) headers['Content-Type'] = 'application/json';
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetched(new URL(path, BASE), {
      method,
      headers,
      body: body && JSON.stringify(body),
      signal,
    });
    if (response.ok) return response;
    if (response.status === 401 && askForKey && !quiet) {
      if (apiKey() !== key) continue; // given meanwhile, for another request
      asking ??= askForKey(Boolean(key)).finally(() => {
        asking = null;
      });
      if (await asking) continue;
    }
    throw await refusal(response);
  }
}

export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

async function fetched(url, options) {
  try {
    return await fetch(url, { ...options, cache: 'no-store', redirect: 'error' });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError('', { code: 'unreachable' });
  }
}

async function refusal(response) {
  const told = await response.json().catch(() => null);
  const error = told?.error ?? {};
  return new ApiError(error.message ?? `${response.status} ${response.statusText}`, {
    status: response.status,
    code: error.code ?? null,
    retryAfter: Number(response.headers.get('retry-after')) || null,
  });
}

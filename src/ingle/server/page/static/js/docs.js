// The API's schema, as Swagger UI shows it; with the key that was given to the page at `/`, or asked for here.

import { apiKey, keepKey } from './api.js';

/* global SwaggerUIBundle */
const schema = document.getElementById('schema').href;

async function needsKey() {
  const key = apiKey();
  const response = await fetch(schema, { method: 'HEAD', headers: key ? { Authorization: `Bearer ${key}` } : {} });
  return response.status === 401;
}

while (await needsKey()) {
  const given = prompt('This server asks for an API key · 此服务器需要 API 密钥');
  if (!given) break;
  keepKey(given.trim(), true);
}

SwaggerUIBundle({
  url: schema,
  dom_id: '#viewer',
  deepLinking: true,
  docExpansion: 'list',
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  requestInterceptor(request) {
    const key = apiKey();
    if (key && !request.headers.Authorization && new URL(request.url).origin === location.origin)
      request.headers.Authorization = `Bearer ${key}`;
    return request;
  },
});

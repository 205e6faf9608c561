// `ai` with `@ai-sdk/openai-compatible`: ai-sdk.mjs URL SCRIPTED_URL MODEL
import assert from 'node:assert/strict'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { embedMany, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from 'ai'
import { z } from 'zod'

const [url, scripted, name] = process.argv.slice(2)
const provider = base => createOpenAICompatible({
  name: 'ingle', baseURL: `${base}/v1`, apiKey: 'none', includeUsage: true, supportsStructuredOutputs: true,
})
const model = provider(url)(name)
const actor = provider(scripted)(name)
const degrees = { Paris: '18 degrees', 北京: '7 degrees' }
const schema = z.object({ kind: z.enum(['cat', 'dog', '鸟']), legs: z.number().int().min(0).max(8) })
const tools = {
  get_weather: tool({
    description: 'The weather in a city',
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => degrees[city],
  }),
}
const options = { temperature: 0, maxOutputTokens: 20, maxRetries: 0, prompt: 'Say hello.' }

// text, whole and streamed
const whole = await generateText({ model, ...options })
const streamed = streamText({ model, ...options })
let told = ''
for await (const delta of streamed.textStream) told += delta
assert.ok(whole.text)
assert.equal(told, whole.text)
assert.equal(await streamed.finishReason, whole.finishReason)
assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens)

// thoughts
const thinks = await generateText({ model: actor, prompt: '[script:thinks] 2+2?' })
assert.deepEqual([thinks.text.trim(), thinks.reasoningText.trim()], ['It is four.', 'Let me see.'])
const thinking = streamText({ model: actor, prompt: '[script:thinks] 2+2?' })
assert.equal((await thinking.text).trim(), 'It is four.')
assert.equal((await thinking.reasoningText).trim(), 'Let me see.')

// tools in a loop
for (const script of ['both', 'weather']) {
  const asked = { model: actor, tools, stopWhen: stepCountIs(4), prompt: `[script:${script}] How warm is it?` }
  const answer = script === 'both' ? '18 in Paris, 7 in 北京.' : 'It is 18 degrees in Paris.'
  assert.equal((await generateText(asked)).text, answer)
  const stream = streamText(asked)
  assert.equal(await stream.text, answer)
  assert.equal((await stream.steps).length, 2)
}

// a tool that has to be called
const forced = await generateText({ model, tools: { get_weather: { ...tools.get_weather, execute: undefined, inputSchema: z.object({ city: z.enum(['Paris', '北京']) }) } }, toolChoice: 'required', prompt: 'Go.' })
assert.equal(forced.finishReason, 'tool-calls')
assert.ok(forced.toolCalls[0].input.city in degrees)

// objects
assert.ok(schema.safeParse((await generateObject({ model, schema, prompt: 'An animal.' })).object).success)
const parts = streamObject({ model, schema, prompt: 'An animal.' })
let text = ''
for await (const delta of parts.textStream) text += delta
assert.ok(schema.safeParse(JSON.parse(text)).success)
assert.ok(schema.safeParse(await parts.object).success)

// embeddings
const { embeddings } = await embedMany({ model: provider(url).embeddingModel(name), values: ['The sea', '海'] })
assert.equal(embeddings.length, 2)
assert.notDeepEqual(embeddings[0], embeddings[1])

// errors
await assert.rejects(generateText({ model: provider(url)('nobody'), prompt: 'x', maxRetries: 0 }), error =>
  error.statusCode === 404 && /nobody/.test(error.message))

console.log('ok')

// Vercel's AI SDK: node ai_sdk.mjs [--responses | --anthropic] [--stream] TASK
import { anthropic } from "@ai-sdk/anthropic";
import { openai } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const has = (flag) => process.argv.includes(flag);
const add = tool({
  description: "Add two numbers.",
  inputSchema: z.object({ a: z.number(), b: z.number() }),
  execute: async ({ a, b }) => a + b,
});
const request = {
  model: has("--anthropic")
    ? anthropic("policy")
    : has("--responses")
      ? openai.responses("policy")
      : openai.chat("policy"),
  system: "You are a calculator.",
  prompt: process.argv.at(-1),
  tools: { add },
  stopWhen: stepCountIs(5),
};
const result = has("--stream") ? streamText(request) : await generateText(request);
console.log(await result.text);

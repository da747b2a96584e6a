// The OpenAI Agents SDK for JavaScript: node openai_agents.mjs [--chat] [--stream] TASK
import { Agent, run, setOpenAIAPI, tool } from "@openai/agents";
import { z } from "zod";

if (process.argv.includes("--chat")) setOpenAIAPI("chat_completions");
const add = tool({
  name: "add",
  description: "Add two numbers.",
  parameters: z.object({ a: z.number(), b: z.number() }),
  execute: async ({ a, b }) => String(a + b),
});
const agent = new Agent({
  name: "Calculator",
  instructions: "You are a calculator.",
  model: "policy",
  tools: [add],
});
const stream = process.argv.includes("--stream");
const result = await run(agent, process.argv.at(-1), { stream });
if (stream) await result.completed;
console.log(result.finalOutput);

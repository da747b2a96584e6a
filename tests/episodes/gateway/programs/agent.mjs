// A loop over the npm package openai: node agent.mjs [--stream] [--responses] TASK
import OpenAI from "openai";

const task = process.argv.at(-1);
const stream = process.argv.includes("--stream");
const client = new OpenAI();
const instructions = "You are a calculator.";
const add = {
  name: "add",
  description: "Add two numbers.",
  parameters: {
    type: "object",
    properties: { a: { type: "integer" }, b: { type: "integer" } },
    required: ["a", "b"],
  },
};

function sum(text) {
  const { a, b } = JSON.parse(text);
  return String(a + b);
}

async function chat() {
  const tools = [{ type: "function", function: add }];
  const messages = [
    { role: "system", content: instructions },
    { role: "user", content: task },
  ];
  for (;;) {
    const request = { model: "policy", messages, tools };
    const completion = stream
      ? await client.chat.completions.stream(request).finalChatCompletion()
      : await client.chat.completions.create(request);
    const { message } = completion.choices[0];
    messages.push(message);
    if (!message.tool_calls?.length) return message.content;
    for (const call of message.tool_calls) {
      const content = sum(call.function.arguments);
      messages.push({ role: "tool", tool_call_id: call.id, content });
    }
  }
}

async function responses() {
  const tools = [{ type: "function", ...add }];
  const input = [{ role: "user", content: task }];
  for (;;) {
    const request = { model: "policy", instructions, input, tools };
    const response = stream
      ? await client.responses.stream(request).finalResponse()
      : await client.responses.create(request);
    input.push(...response.output);
    const calls = response.output.filter((item) => item.type === "function_call");
    if (!calls.length) return response.output_text;
    for (const call of calls) {
      const output = sum(call.arguments);
      input.push({ type: "function_call_output", call_id: call.call_id, output });
    }
  }
}

console.log(await (process.argv.includes("--responses") ? responses() : chat()));

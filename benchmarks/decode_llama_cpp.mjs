// Tokens a second of llama.cpp, through its Node binding; see decode_cpu.py.
//
//     node decode_llama_cpp.mjs MODEL.gguf PROMPT TOKENS ROUNDS THREADS
//
// Prints one JSON object: the best of the rounds, of the tokens after the first.

import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(`${process.cwd()}/`);
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const [modelPath, prompt, ...numbers] = process.argv.slice(2);
const [tokens, rounds, threads] = numbers.map(Number);
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 1024, sequences: 1, threads});
const sequence = context.getSequence();
let best = 0;
for (let round = 0; round < rounds; round++) {
    await sequence.clearHistory();
    let count = 0;
    let begin = 0;
    const ids = model.tokenize(prompt, true);
    for await (const _ of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        if (count++ === 0) begin = performance.now();
        if (count > tokens) break;
    }
    best = Math.max(best, (count - 1) / ((performance.now() - begin) / 1000));
}
const release = llama.llamaCppRelease;
console.log(JSON.stringify({tokens_per_second: best, llama_cpp: `${release.repo} ${release.release}`}));
process.exit(0);

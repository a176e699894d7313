// What llama.cpp makes of a GGUF file, through its Node binding; see interop_llama_cpp.py.
//
//     node interop_llama_cpp.mjs MODEL.gguf REQUEST.json
//
// REQUEST has `texts` to tokenize, `prompts` to continue greedily by `tokens` tokens, and how many of
// the `best` tokens to score at each place of the replies, or of the `places` that it has instead.
// Prints one JSON object: `ids` of each text, and of each prompt `prompt_ids`, `reply_ids` and `best`,
// the logarithms of probabilities.

import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(`${process.cwd()}/`);
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const [modelPath, requestPath] = process.argv.slice(2);
const request = JSON.parse(readFileSync(requestPath, "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 512, sequences: 1, threads: 1});
const sequence = context.getSequence();
const ids = request.texts.map((text) => [...model.tokenize(text, true)]);
const replies = [];
const all = {temperature: 1, topK: 0, topP: 1, minP: 0};
const scored = {generateNext: {probabilities: true, options: all}};
for (const [i, prompt] of request.prompts.entries()) {
    const promptIds = model.tokenize(prompt, true);
    const replyIds = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(promptIds, {temperature: 0, yieldEogToken: true})) {
        replyIds.push(token);
        if (replyIds.length === request.tokens || model.isEogToken(token)) break;
    }
    const forced = request.places?.[i] ?? replyIds;
    const tokens = [...promptIds, ...forced.slice(0, -1)];
    await sequence.clearHistory();
    const scores = await sequence.controlledEvaluate(
        tokens.map((token, at) => (at < promptIds.length - 1 ? token : [token, scored]))
    );
    const best = scores.filter(Boolean).map(({next}) =>
        Object.fromEntries(
            [...next.probabilities].slice(0, request.best).map(([token, p]) => [token, Math.log(p)])
        )
    );
    replies.push({prompt_ids: [...promptIds], reply_ids: replyIds, best});
}
const release = llama.llamaCppRelease;
console.log(JSON.stringify({ids, replies, llama_cpp: `${release.repo} ${release.release}`}));
process.exit(0);

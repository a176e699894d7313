// What llama.cpp makes of a GGUF file, through its Node binding; see interop_llama_cpp.py.
//
//     node interop_llama_cpp.mjs MODEL.gguf REQUEST.json
//
// REQUEST has `texts` to tokenize and `prompts` to continue greedily by `tokens` tokens. Prints one
// JSON object: `ids` of each text, and `prompt_ids` and `reply_ids` of each prompt.

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
for (const prompt of request.prompts) {
    const promptIds = model.tokenize(prompt, true);
    const replyIds = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(promptIds, {temperature: 0, yieldEogToken: true})) {
        replyIds.push(token);
        if (replyIds.length === request.tokens || model.isEogToken(token)) break;
    }
    replies.push({prompt_ids: [...promptIds], reply_ids: replyIds});
}
const release = llama.llamaCppRelease;
console.log(JSON.stringify({ids, replies, llama_cpp: `${release.repo} ${release.release}`}));
process.exit(0);

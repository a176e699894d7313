"""Run an AWQ or a GPTQ checkpoint by the lines that its model card gives for Transformers.

python examples/transformers_three_lines.py FOLDER "The capital of France is"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import salience.hf


def main(folder: str, prompt: str, max_new_tokens: int = 20) -> str:
    salience.hf.enable()

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)

    output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main(*sys.argv[1:3])

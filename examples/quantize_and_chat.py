"""Quantize a model, look at what was found, and talk to the result.

python examples/quantize_and_chat.py smollm2-135m smollm2-w4
"""

import sys

import salience
from salience.chat.session import Session
from salience.runtime import Engine
from salience.source import open_source


def main(model: str, out: str, samples: int = 16, seqlen: int = 256) -> str:
    calibration = salience.Calibration(samples=samples, seqlen=seqlen)
    report = salience.quantize(model, out, scheme="w4g32", calibration=calibration)
    worst = max(report.linears, key=lambda linear: linear.error)
    print(f"{report.bits_per_weight:.2f} bits a weight")
    print(f"largest error {worst.error:.1%} in {worst.name}")

    session = Session(Engine(salience.load(out), open_source(out).tokenizer))
    answer = session.ask("Name three primary colours.")
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:3])

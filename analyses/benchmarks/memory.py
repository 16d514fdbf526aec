"""Does reading need more memory than the forward pass, and does it grow with the number of texts?

Each case runs in a process of its own; peak resident memory is the operating system's own count. Many stimuli are passages with
a running number in front, so that no two are the same.
"""

import argparse
import resource
import subprocess
import sys


def run(case: str, n_texts: int, model_name: str) -> None:
    import torch

    import lens_affect as la
    from lens_affect.adapter import encode, pad_right, pad_token_id, run_trunk

    passages = la.load_stimuli("passages")
    texts = [f"{i}. {passages.texts[i % len(passages)]}" for i in range(n_texts)]
    model = la.load_model(model_name, dtype=torch.float32)
    if case == "forward":
        encoded = sorted((encode(model, text) for text in texts), key=lambda e: -len(e.ids))
        size = 1024 // len(encoded[0].ids)
        for start in range(0, len(encoded), size):
            run_trunk(model, *pad_right(encoded[start : start + size], pad_token_id(model), torch.device("cpu")))
    else:
        column = {
            name: tuple(getattr(passages, name)[i % len(passages)] for i in range(n_texts))
            for name in ("emotions", "groups", "sources", "prompts")
        }
        la.extract_activations(model, la.Stimuli(texts=tuple(texts), **column), keep=case)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(case: str, n_texts: int, model_name: str) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--case", case, "--texts", str(n_texts), "--model", model_name],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--case", choices=["forward", "pooled", "moments"])
    options.add_argument("--texts", type=int, default=100)
    options.add_argument("--many", type=int, default=2000)
    options.add_argument("--model", default="smollm2-135m-instruct")
    chosen = options.parse_args()
    if chosen.case:
        run(chosen.case, chosen.texts, chosen.model)
        return
    forward = measure("forward", chosen.texts, chosen.model)
    print(f"bare forward, {chosen.texts} texts: {forward:.0f} MB peak", flush=True)
    for case in ("pooled", "moments"):
        few = measure(case, chosen.texts, chosen.model)
        print(f"{case}, {chosen.texts} texts: {few:.0f} MB, {few / forward:.3f} of the bare forward pass", flush=True)
        many = measure(case, chosen.many, chosen.model)
        print(f"{case}, {chosen.many} texts: {many:.0f} MB, {many / few:.3f} of {chosen.texts} texts", flush=True)


if __name__ == "__main__":
    main()

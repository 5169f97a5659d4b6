"""Load a checkpoint and write with it."""

import argparse
import os

from transformers import AutoTokenizer

from hf_tpp import from_pretrained

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder or name, such as what raw_loop.py saved")
parser.add_argument("--prompt", default="def ")
parser.add_argument("--tp", type=int, default=1)
parser.add_argument("--pp", type=int, default=1)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = from_pretrained(args.model, tp=args.tp, pp=args.pp)
prompt = tokenizer(args.prompt, return_tensors="pt")["input_ids"].to(model.device)
written = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
if os.environ.get("RANK", "0") == "0":
    print(repr(tokenizer.decode(written[0])))

"""Load a checkpoint and write with it."""

import argparse
import os

from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder or name, such as what raw_loop.py saved")
parser.add_argument("--prompt", default="def ")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
prompt = tokenizer(args.prompt, return_tensors="pt")["input_ids"].to(model.device)
written = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
if os.environ.get("RANK", "0") == "0":
    print(repr(tokenizer.decode(written[0])))

"""Read a document once, keep 40 % of it, and ask several questions."""

from pathlib import Path

import kvhive

model, tokenizer = kvhive.load("smollm2")
reading = kvhive.read(model, tokenizer, Path(__file__).with_name("demo.md"), "h2o@0.4")
print(reading.report())

# Each question sees the document alone.
for question in ("What is the claim number?", "What is the name of the insurer?"):
    print("\n" + question)
    print(reading.ask(question, max_new_tokens=40))

# In a conversation, each sees the earlier questions and answers too; here as they come.
talk = reading.conversation()
for question in ("Who was the keeper of the lock?", "What did he name the queen?"):
    print("\n" + question)
    for piece in talk.stream(question, max_new_tokens=40):
        print(piece, end="", flush=True)
    print()

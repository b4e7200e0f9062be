"""The model that ships: its corpus, its tokenizer and the script that trains it."""

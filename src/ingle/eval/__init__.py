"""One's own cases put to models, and what their answers are worth. `cli/eval.py` is the command.

`cases` reads what is asked, `targets` who is asked, `ask` asks, `scoring` judges an answer, `record` keeps it,
`statistics` and `results` make figures of all, `report` a page.
"""

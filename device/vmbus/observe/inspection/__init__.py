"""Looking inside: one document for a running device server and for what was saved of one.

`document` says what is shown, `collect` makes it from a live device, `saved` from a snapshot, a checkpoint or a state
file. `tree` shows it to people, `difference` compares two, `watch` shows a running one again and again.
"""

"""Bundled single-turn text testbeds: prompts, a reference answer, and a programmatic gold judge that learners never see."""

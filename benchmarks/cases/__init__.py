"""What is timed. A case is a module with

    PEER, UNIT, UNITS_A_STEP, STEPS, WARMUP, SETTINGS     what is compared, and how much of it in one measurement
    prepare(settings, gate)                               writes the model and the data into settings["folder"]
    ours, peer, limit (settings, gate)                    run without end; `gate.begin()` after the imports, `gate.step(value)` after a step
    compare(ours, peer) -> dict                           what the record says of the two sides' values in the warm-up

`ours` and `limit` run in our environment, `peer` in that of the peers; so imports stand inside the functions.
"""

"""The contenders of bench/compare.py: one file for each library, whose name ends in `_` or says how it is compiled. works.py says what
they do, model.py makes the model and inputs that they share, process.py starts run.py, which runs one of them in a process of its own.

Each file has `PACKAGES`, `start(spec)`, `load(spec)`, `prepare(model, job, inputs)` and the functions named for the works:

- `prefill(model, job)` → `logits [B, V]` of each row's last token;
- `readout(model, job)` → the same, and `scores [L, B, T, E]`, float32, of every token after every block;
- `generate(model, job)` → `tokens [B, n]`, greedy and to the end, and where `job.read`, `scores [B, n, E]` of every generated token
  after block `job.layer`;
- `sweep(model, job)` → `tokens [C, P, n]` for every condition and prompt, `job.batch` rows at once.

Steering is always `job.vectors [rows or C, D]`, what is added to the residual stream after block `job.layer` at every token, prompt and
generated. Results stay on the device; `finish` waits for them.
"""

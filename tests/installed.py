"""Run an installed jaxquant with what it needs and nothing else: `python tests/installed.py`.

pytest does not collect it. It fails where native code was not compiled.
"""

import jax
import numpy as np

import jaxquant as jq
from jaxquant import cpp

params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}}
plan = jq.mlq(params, groups=1)
state = jq.init(plan, params)
for _ in range(plan.num_rounds):
    params, state, _ = jq.quantize_round(plan, params, state)
packed = jq.pack(params, state)
x = np.ones((1, 64), np.float32)
np.testing.assert_allclose(
    jq.matmul(x, packed["dense"]["kernel"]), x @ params["dense"]["kernel"], rtol=1e-4, atol=1e-4
)
assert len(np.unique(params["dense"]["kernel"])) == 3
assert cpp.missing() is None, cpp.missing()
print(jq.report(params, state))
print(jq.__version__, jq.__file__, cpp.level())

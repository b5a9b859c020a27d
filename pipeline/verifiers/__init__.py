"""The verifiers, one module each; ``stillhouse.pipeline.verification.verify`` is the door to them."""

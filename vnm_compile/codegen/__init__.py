"""From `vnm::linear` to kernels: lowerings, templates and what they know of Inductor."""

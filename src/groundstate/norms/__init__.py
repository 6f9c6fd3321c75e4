"""Pure functions on tensors of shape ``(*batch, out, in)``: values, gradients, proximal maps, dual norms, linear
minimization oracles. No classes, no models; everything else stands on this floor."""

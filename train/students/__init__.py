"""Students: small vision models with a uniform output."""

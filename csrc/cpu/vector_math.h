// Vectors of floats, whatever their size: included (more than once) where Floats, Ints and INLINE are defined.

INLINE Floats read(const void* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
INLINE void write(void* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// exp(x) for x <= 0, to about an ulp; 0 for -inf, NaN for NaN
INLINE Floats exp_negative(Floats x) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats rounded = x * 1.44269504088896341f + shift;
  const Floats n = rounded - shift;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints power = ((Ints)rounded + 127) << 23;
  return x < -87.0f ? Floats{} : p * (Floats)power;
}

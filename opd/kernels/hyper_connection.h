// What the loops of hyper_connection_kernels.h take. Included inside the includer's anonymous namespace.
//
// Streams are [n, tokens, width], coefficients [rows, tokens]; collapsed, output and their gradients [tokens, width].

constexpr int64_t LARGE = 8 << 20;  // bytes that do not stay in a processor's caches until they are read again

template <typename T>
struct CollapseArguments {
  const T *streams, *fn_t, *base, *scale;
  T *collapsed, *post, *residual, *mix, *inverse;
  int64_t tokens, width, padded;
  T norm_eps, hc_eps;
  int iterations;
};

template <typename T>
struct CollapseGradients {
  const T *streams, *fn, *base, *scale, *mix, *inverse, *grad_collapsed, *grad_post, *grad_residual;
  T *grad_streams, *grad_logits;
  int64_t tokens, width;
  T hc_eps;
  int iterations;
};

template <typename T>
struct ExpandArguments {
  const T *streams, *output, *post, *residual;
  T* mixed;
  int64_t tokens, width;
};

template <typename T>
struct ExpandGradients {
  const T *streams, *output, *post, *residual, *grad;
  T *grad_streams, *grad_output, *grad_post, *grad_residual;
  int64_t tokens, width;
};

// Streams of a few tokens: number j of token t is at + j * stride + t * width.
template <typename T>
struct Tile {
  T* at;
  int64_t stride;
};

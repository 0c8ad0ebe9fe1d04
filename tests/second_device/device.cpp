// A device that is not the CPU, for machines without one: torch's spare backend ("PrivateUse1"), whose memory is the
// CPU's and whose arithmetic is the CPU's. It is as strict as CUDA: an operation takes no operands of two devices but
// numbers without axes and indices, and its random numbers come from a generator of its own. On request it has no
// float64, like Apple's MPS.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device HERE(KIND, 0);
bool without_float64 = false;

bool ours(const at::Tensor& t) { return t.device().type() == KIND; }

// What torch asks of any device ---------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* at = c10::alloc_cpu(bytes);
    return {at, at, &c10::free_cpu, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = KIND;
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// A generator of this device: one of the CPU's under another name.
struct Random final : c10::GeneratorImpl {
  at::Generator inner;
  explicit Random(at::Generator g)
      : GeneratorImpl(HERE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(std::move(g)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override { return new Random(inner.clone()); }
};

const at::Generator& generator() {
  static const auto one = at::make_generator<Random>(at::detail::createCPUGenerator(67280421310721));
  return one;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Random>(at::detail::createCPUGenerator());
  }
};
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// Tensors: made, seen as the CPU's, copied ----------------------------------------------------

c10::ScalarType allowed(std::optional<c10::ScalarType> asked) {
  const auto dtype = c10::dtype_or_default(asked);
  const bool wide = dtype == at::kDouble || dtype == at::kComplexDouble;
  TORCH_CHECK_TYPE(!(wide && without_float64), "this device has no float64; use float32 instead");
  return dtype;
}

const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, allowed(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  const auto shape = C10_AS_INTARRAYREF_SLOW(size), steps = C10_AS_INTARRAYREF_SLOW(stride);
  return at::detail::empty_strided_generic(shape, steps, &memory, KEYS, allowed(dtype));
}

// The same memory as a tensor of the CPU.
at::Tensor seen(const at::Tensor& t) {
  if (!t.defined() || !ours(t)) return t;
  const auto storage = t.storage();
  const auto count = static_cast<int64_t>(storage.nbytes() / t.element_size());
  const auto flat = at::from_blob(const_cast<void*>(storage.data()), {count}, [storage](void*) {},
                                  at::TensorOptions().dtype(t.dtype()));
  return flat.as_strided(t.sizes(), t.strides(), t.storage_offset());
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool) {
  at::NoGradGuard constant;
  seen(to).copy_(seen(from));
  return to;
}
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  seen(to).copy_(seen(from));
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}
at::Scalar number(const at::Tensor& t) { return seen(t).item(); }

// Views ---------------------------------------------------------------------------------------

at::Tensor as_strided(const at::Tensor& t, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> from) {
  return at::native::as_strided_tensorimpl(t, size, stride, from);
}
at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}
at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
at::Tensor unfold(const at::Tensor& t, int64_t axis, int64_t size, int64_t step) {
  return at::native::unfold(t, axis, size, step);
}
const at::Tensor& resize_(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}
at::Tensor& set_(at::Tensor& t, at::Storage from, c10::SymInt offset, c10::SymIntArrayRef size,
                 c10::SymIntArrayRef stride) {
  return at::native::set_storage_meta__symint(t, std::move(from), offset, size, stride);
}
at::Tensor& set_whole(at::Tensor& t, at::Storage from) {
  const auto count = static_cast<int64_t>(from.nbytes() / t.element_size());
  return set_(t, std::move(from), 0, c10::SymIntArrayRef(c10::SymInt(count)), {});
}

// Everything else: the CPU's own operation, once its operands are known to be on one device ----

[[noreturn]] void two_devices(const std::string& name) {
  C10_THROW_ERROR(Error, "expected all tensors on the same device, but found two devices in " + name);
}

void same_device(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> values) {
  const auto& name = op.schema().name();
  const bool indexing = name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
                        name == "aten::_index_put_impl_" || name == "aten::_unsafe_index";
  bool device = false, cpu = false;
  auto look = [&](const at::Tensor& t, bool number_allowed) {
    if (!t.defined()) return;
    if (ours(t)) device = true;
    else if (t.dim() > 0 || !number_allowed) cpu = true;
  };
  for (size_t i = 0; i < values.size(); ++i) {
    const auto& value = values[i];
    const auto* alias = op.schema().arguments()[i].alias_info();
    if (value.isTensor()) {
      look(value.toTensor(), !(alias && alias->isWrite()));
    } else if (value.isList()) {
      for (const c10::IValue& part : value.toListRef()) {
        if (!part.isTensor()) continue;
        if (!indexing) look(part.toTensor(), false);
        else if (part.toTensor().defined() && ours(part.toTensor()) && !ours(values[0].toTensor())) two_devices(name);
      }
    }
  }
  if (device && cpu) two_devices(name);
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto count = op.schema().arguments().size();
  same_device(op, torch::jit::last(*stack, count));
  for (auto value = stack->end() - static_cast<std::ptrdiff_t>(count); value != stack->end(); ++value) {
    const bool drawn = value->isGenerator();
    if (!drawn && value->isNone() && op.schema().arguments()[value - (stack->end() - count)].name() == "generator") {
      *value = static_cast<const Random*>(generator().unsafeGetGeneratorImpl())->inner;
    } else if (drawn) {
      const auto given = value->toGenerator();
      TORCH_CHECK(given.device() == HERE, "expected a generator of this device, but found one of ", given.device());
      *value = static_cast<const Random*>(given.unsafeGetGeneratorImpl())->inner;
    }
  }
  at::native::cpu_fallback(op, stack);
}

// torch gives convolutions on a device it does not know to these two.
at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const bool biased = b && b->defined();
  if (!ours(x) || !ours(w) || (biased && !ours(*b))) two_devices("convolution");
  const auto bias = biased ? std::optional(seen(*b)) : std::nullopt;
  return at::convolution_symint(seen(x), seen(w), bias, stride, padding, dilation, transposed, output_padding, groups)
      .to(HERE);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& g, const at::Tensor& x, const at::Tensor& w, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> asked) {
  if (!ours(g) || !ours(x) || !ours(w)) two_devices("convolution_backward");
  const std::vector<c10::SymInt> bias = {transposed ? w.sym_size(1) * groups : w.sym_size(0)};
  const auto found = at::convolution_backward_symint(seen(g), seen(x), seen(w), c10::SymIntArrayRef(bias), stride,
                                                     padding, dilation, transposed, output_padding, groups, asked);
  auto back = [](const at::Tensor& t) { return t.defined() ? t.to(HERE) : t; };
  return {back(std::get<0>(found)), back(std::get<1>(found)), back(std::get<2>(found))};
}

// Its form with `out=`, which torch would call here, warns of the size that it gives `out` itself.
at::Tensor mse_loss(const at::Tensor& x, const at::Tensor& y, int64_t reduction) {
  if ((!ours(x) && x.dim()) || (!ours(y) && y.dim())) two_devices("mse_loss");
  return at::mse_loss(seen(x), seen(y), reduction).to(HERE);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", number);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_);
  m.impl("set_.source_Storage", set_whole);
  m.impl("mse_loss", mse_loss);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
}

TORCH_LIBRARY(second_device, m) {
  m.def("without_float64(bool yes) -> ()", [](bool yes) { without_float64 = yes; });
  m.def("manual_seed(int seed) -> ()", [](int64_t seed) { at::Generator(generator()).set_current_seed(seed); });
  m.def("get_rng_state() -> Tensor", [] { return generator().get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const at::Tensor& s) { at::Generator(generator()).set_state(s); });
}

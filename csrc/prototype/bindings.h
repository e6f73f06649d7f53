// Included by bindings.cpp alone.
#pragma once

#include "binding.h"
#include "prototype/op.h"

namespace wsss {
namespace {

// Kernels count in 32 bits, and divide below 2^31: pixels and channels of all images, and their blocks.
constexpr int64_t kMostCounted = int64_t{1} << 30;

void prototype_seeds(const TensorView& cam, const TensorView& tags, const OptionalTensor& valid,
                     double background_scale, const TensorView& seeds, uint64_t where) {
    prototype::SeedParams p{};
    p.dtype = cam.dtype();
    p.images = cam.size(0);
    p.classes = cam.size(1);
    p.cam_height = cam.size(2);
    p.cam_width = cam.size(3);
    p.height = seeds.size(1);
    p.width = seeds.size(2);
    p.cam = cam.data();
    p.strides = strides_of(cam);
    p.tags = reinterpret_cast<const bool*>(tags.data());
    p.valid = static_cast<const bool*>(data_or_null(valid));
    p.background_scale = background_scale;
    p.seeds = reinterpret_cast<int16_t*>(seeds.data());
    if (p.images * p.height * p.width > kMostCounted) throw std::invalid_argument("more than 2^30 pixels");
    run(prototype::find_seeds, p, cam, where);
}

prototype::LevelParams level_params(const TensorView& level, const TensorView& resized, bool normalise) {
    prototype::LevelParams p{};
    p.dtype = level.dtype();
    p.images = level.size(0);
    p.channels = level.size(1);
    p.height = level.size(2);
    p.width = level.size(3);
    p.out_height = resized.size(2);
    p.out_width = resized.size(3);
    p.normalise = normalise;
    p.level = level.data();
    p.strides = strides_of(level);
    p.resized_strides = strides_of(resized);
    for (const TensorView& map : {level, resized}) {
        if (map.size(0) * map.size(2) * map.size(3) > kMostCounted) {
            throw std::invalid_argument("more than 2^30 pixels");
        }
    }
    return p;
}

void prototype_level(const TensorView& level, bool normalise, const TensorView& resized, uint64_t where) {
    prototype::LevelParams p = level_params(level, resized, normalise);
    p.resized = resized.data();
    run(prototype::resize_level, p, level, where);
}

void prototype_level_backward(const TensorView& resized_gradient, const TensorView& level, bool normalise,
                              const TensorView& level_gradient, uint64_t where) {
    prototype::LevelParams p = level_params(level, resized_gradient, normalise);
    p.resized_gradient = resized_gradient.data();
    p.level_gradient = level_gradient.data();
    p.gradient_strides = strides_of(level_gradient);
    run(prototype::differentiate_level, p, level, where);
}

// features: [images][channels][height][width], images dense; counts: [images][classes].
prototype::Params prototype_params(const TensorView& features, bool channels_last, const TensorView& seeds,
                                   const TensorView& counts) {
    prototype::Params p{};
    p.dtype = features.dtype();
    p.images = features.size(0);
    p.classes = counts.size(1);
    p.channels = features.size(1);
    p.pixels = features.size(2) * features.size(3);
    p.channels_last = channels_last;
    p.features = features.data();
    p.image_stride = features.stride(0);
    p.seeds = reinterpret_cast<const int16_t*>(seeds.data());
    p.counts = reinterpret_cast<int32_t*>(counts.data());
    if (p.images * p.pixels > kMostCounted || p.images * p.channels > kMostCounted) {
        throw std::invalid_argument("more than 2^30 pixels or channels");
    }
    if (p.classes * p.channels > kMostCounted)
        throw std::invalid_argument("more than 2^30 classes * channels");
    return p;
}

// Prototypes, their lengths, cosines and the features' lengths; prototypes alone where others are missing.
void prototype_forward(const TensorView& features, bool channels_last, const TensorView& seeds,
                       const TensorView& counts, const TensorView& prototypes,
                       const OptionalTensor& prototype_lengths, const OptionalTensor& lengths,
                       const OptionalTensor& cosines, uint64_t where) {
    prototype::Params p = prototype_params(features, channels_last, seeds, counts);
    p.prototypes = prototypes.data();
    run(prototype::average, p, features, where);
    if (!cosines) return;
    p.prototype_lengths = data_or_null(prototype_lengths);
    p.lengths = data_or_null(lengths);
    p.cosines = cosines->data();
    run(prototype::compare, p, features, where);
}

// scratch: weights, selves, alongs and, unless prototypes are detached, shares of csrc/prototype/op.h.
void prototype_backward(const TensorView& gradient, const TensorView& features, bool channels_last,
                        const TensorView& seeds, const TensorView& counts, const TensorView& prototypes,
                        const TensorView& prototype_lengths, const TensorView& lengths,
                        const TensorView& cosines, const TensorView& weights, const TensorView& selves,
                        const TensorView& alongs, const OptionalTensor& shares,
                        const TensorView& feature_gradient, uint64_t where) {
    prototype::Params p = prototype_params(features, channels_last, seeds, counts);
    p.gradient = gradient.data();
    p.prototypes = prototypes.data();
    p.prototype_lengths = prototype_lengths.data();
    p.lengths = lengths.data();
    p.cosines = cosines.data();
    p.weights = weights.data();
    p.selves = selves.data();
    p.alongs = alongs.data();
    p.shares = data_or_null(shares);
    p.feature_gradient = feature_gradient.data();
    run(prototype::differentiate, p, features, where);
}

// Gives each pixel of a class what `shares` holds for it, and zeros to the others.
void prototype_spread(const TensorView& shares, bool channels_last, const TensorView& seeds,
                      const TensorView& counts, const TensorView& feature_gradient, uint64_t where) {
    prototype::Params p = prototype_params(feature_gradient, channels_last, seeds, counts);
    p.shares = shares.data();
    p.feature_gradient = feature_gradient.data();
    run(prototype::differentiate, p, feature_gradient, where);
}

void bind_prototype(py::module_& m) {
    m.def("prototype_seeds", &prototype_seeds, py::arg("cam"), py::arg("tags"), py::arg("valid"),
          py::arg("background_scale"), py::arg("seeds"), py::arg("where"));
    m.def("prototype_level", &prototype_level, py::arg("level"), py::arg("normalise"), py::arg("resized"),
          py::arg("where"));
    m.def("prototype_level_backward", &prototype_level_backward, py::arg("resized_gradient"),
          py::arg("level"), py::arg("normalise"), py::arg("level_gradient"), py::arg("where"));
    m.def("prototype_forward", &prototype_forward, py::arg("features"), py::arg("channels_last"),
          py::arg("seeds"), py::arg("counts"), py::arg("prototypes"), py::arg("prototype_lengths"),
          py::arg("lengths"), py::arg("cosines"), py::arg("where"));
    m.def("prototype_backward", &prototype_backward, py::arg("gradient"), py::arg("features"),
          py::arg("channels_last"), py::arg("seeds"), py::arg("counts"), py::arg("prototypes"),
          py::arg("prototype_lengths"), py::arg("lengths"), py::arg("cosines"), py::arg("weights"),
          py::arg("selves"), py::arg("alongs"), py::arg("shares"), py::arg("feature_gradient"),
          py::arg("where"));
    m.def("prototype_spread", &prototype_spread, py::arg("shares"), py::arg("channels_last"),
          py::arg("seeds"), py::arg("counts"), py::arg("feature_gradient"), py::arg("where"));
}

}  // namespace
}  // namespace wsss
